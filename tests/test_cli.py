"""The command line: exit codes, what goes to stdout and to stderr, and one clear line for every mistake."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import onnx
import pytest

import channelfold
from channelfold import cli, models
from channelfold.passes import recipe
from channelfold.passes import smooth_methods as methods
from channelfold.runtime import jobs
from channelfold.runtime.errors import ChannelfoldError

DIGITS = models.path("digits_cnn.onnx")
CALIBRATION = models.path("digits_calibration.npz")
EVALUATION = models.path("digits_evaluation.npz")
REPAVIT = Path(__file__).parent / "passes" / "fixtures" / "dynamo_20.onnx"
COMMANDS = sorted(cli.cli.commands)


@pytest.fixture
def run(capfd, monkeypatch):
    """Runs a command line in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*args: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli._main([str(arg) for arg in args])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def fails(run):
    """Runs a command line that must fail with one line on stderr and nothing on stdout; returns that line."""

    def fails(code: int, *args: str | Path) -> str:
        found, out, err = run(*args)
        assert (found, out, err.count("\n")) == (code, "", 1), err
        assert err.startswith("error: ")
        return err

    return fails


@pytest.fixture
def samples(tmp_path):
    """Writes an .npz with these arrays."""

    def samples(**arrays: np.ndarray) -> Path:
        np.savez(tmp_path / "samples.npz", allow_pickle=False, **arrays)
        return tmp_path / "samples.npz"

    return samples


# ---- help --------------------------------------------------------------------------------------------------------

BARE = """
import sys

class Bare:
    allowed = {"click", "channelfold", *sys.stdlib_module_names}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.allowed and not name.startswith("__editable__"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Bare())
from channelfold.cli import main
main(sys.argv[1:])
"""


def bare(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BARE, *args], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=" ".join)
def test_help_needs_click_alone(command):
    done = bare(*command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: channelfold {' '.join(command)}".rstrip())


def test_a_command_says_what_is_missing_where_only_click_is_installed():
    done = bare("inspect", "model.onnx")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: channelfold is not fully installed (")
    assert done.stderr.endswith("Run: pip install 'channelfold[cpu]'\n")


def test_help_is_instant():
    """0.3 s is the promise. The best of five runs is not a matter of what else the machine does."""

    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "channelfold", "--help"], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.3


def test_the_package_itself_is_light():
    code = (
        "import sys, channelfold; print(sorted(sys.modules.keys() & {'numpy', 'onnx', 'click', 'rich', 'onnxruntime'}))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_ends_with_an_example_that_parses(name, run):
    _, out, _ = run(name, "--help")
    example = out.splitlines()[-1]
    assert example.startswith(f"    channelfold {name}")
    assert len(example) <= 80
    parse(example)


def parse(line: str) -> click.Context:
    """Parses a command line without running it; raises click.UsageError for anything it does not know."""
    program, name, *args = shlex.split(line)
    assert program == "channelfold"
    return cli.cli.commands[name].make_context(name, args)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name):
    for option in cli.cli.commands[name].params:
        assert isinstance(option, click.Argument) or (option.help and option.help[-1] in ".]"), option.name


def test_options_and_choices_are_those_of_the_pass():
    described = {option["name"]: option for option in recipe.describe("quantize")["options"]}
    for command in ("quantize", "compress"):
        flags = {option.name: option for option in cli.cli.commands[command].params}
        assert described.keys() <= flags.keys()
        for name, option in described.items():
            assert set(getattr(flags[name].type, "choices", ())) == set(option["choices"])
            if option["default"] not in ([], (), None):
                assert f"[default: {spelt(name, option['default'])}]" in (flags[name].help or "")


def test_options_of_smooth_are_those_of_its_passes():
    flags = {option.name: option for option in cli.cli.commands["smooth"].params}
    others = {option.name for option in cli.cli.commands["compress"].params} - {"exclude"}
    heeded = set()
    for method in methods.METHODS.values():
        heeded |= {*method.options, *method.switched, *([method.switch] if method.switch else [])}
        for step, names in {method.step: method.options, method.then or method.step: method.switched}.items():
            described = {option["name"]: option for option in recipe.describe(step)["options"]}
            for name in names:
                assert set(getattr(flags[name].type, "choices", ())) == set(described[name]["choices"])
                if described[name]["default"] not in ([], (), False):
                    assert f"[default: {spelt(name, described[name]['default'])}]" in (flags[name].help or "")
    assert heeded == flags.keys() - others - {"method"}


def test_options_of_reparam_are_those_of_its_passes():
    flags = {option.name: option for option in cli.cli.commands["reparam"].params}
    for step in ("reparameterize-ffn", "approximate-ffn"):
        for option in recipe.describe(step)["options"]:
            flag = flags[option["name"]]
            assert set(getattr(flag.type, "choices", ())) == set(option["choices"])
            if option["default"] not in (None, (), False, "auto"):
                assert f"[default: {spelt(option['name'], option['default'])}]" in (flag.help or "")


def test_options_of_sparsify_are_those_of_the_pass():
    flags = {option.name: option for option in cli.cli.commands["sparsify"].params}
    for option in recipe.describe("sparsify")["options"]:
        flag = flags[option["name"]]
        assert set(getattr(flag.type, "choices", ())) == set(option["choices"])
        if option["default"] not in (None, ()):
            assert f"[default: {spelt(option['name'], option['default'])}]" in (flag.help or "")


def spelt(name: str, default: object) -> str:
    """A default as help texts have it."""
    if isinstance(default, bool):
        return ("" if default else "no-") + name.replace("_", "-")
    return f"{default:g}" if isinstance(default, float) else str(default)


def test_version(run):
    assert run("--version") == (0, f"channelfold {channelfold.__version__}\n", "")


# ---- what goes where ---------------------------------------------------------------------------------------------


def test_json_is_all_there_is_on_stdout(run, tmp_path):
    code, out, err = run("fold", DIGITS, "-o", tmp_path / "out.onnx", "--json")
    record = json.loads(out)
    assert (code, err, record["schema"], record["command"]) == (0, "", 1, "fold")
    assert record["output"]["nodes"] == len(onnx.load(tmp_path / "out.onnx").graph.node) == 17


@pytest.mark.parametrize("name", ["compress", "quantize"])
def test_warnings_go_to_stderr_as_well(name, run, tmp_path):
    code, out, err = run(name, DIGITS, "-o", tmp_path / "out", "--random", "4", "--json")
    assert code == 0
    assert "The inputs are random" in err
    assert err.splitlines() == [f"warning: {warning}" for warning in json.loads(out)["warnings"]]


def test_compress_writes_what_it_says(run, tmp_path):
    line = ("compress", DIGITS, "-o", tmp_path / "out", "--calibration", CALIBRATION, "--evaluation", EVALUATION)
    options = ("--exclude", "/pointwise/*", "--calibrator", "percentile")
    code, out, _ = run(*line, *options)
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx", "report.json"]
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert shlex.split(record["command"]) == [str(part) for part in (*line, *options)]
    assert record["steps"][-1]["options"]["calibrator"] == "percentile"
    assert "/pointwise/conv/Conv" in [refusal["node"] for refusal in record["steps"][-1]["refused"]]
    assert "Accuracy" in out


def test_smooth_shows_each_site(run, tmp_path):
    line = ("smooth", DIGITS, "-o", tmp_path / "out.onnx", "--calibration", CALIBRATION)
    code, out, err = run(*line, "--method", "smoothquant", "--alpha", "0.7", "--exclude", "/pointwise/*")
    assert (code, err) == (0, "")
    assert "By smooth" in out
    assert "  /depthwise/conv/Conv        smoothquant, alpha 0.7  8.1 -> " in out
    assert "  1 x excluded by pattern '/pointwise/*'\n" in out
    assert "Accuracy" not in out


def test_reparam_shows_what_is_saved(run, tmp_path):
    code, out, err = run("reparam", REPAVIT, "-o", tmp_path / "out.onnx")
    assert (code, err) == (0, "")
    assert re.search(r"  parameters +2,448 +800  +32.7%", out)
    assert re.search(r"  MACs per sample +20,480 +7,680 +37.5%", out)
    assert re.search(
        r"By reparameterize-ffn .*\n  node_MatMul_46 +dense, with the shortcut  64 -> 16 +2,048 -> 768", out
    )


def test_reparam_approximates_when_asked_to(run, tmp_path):
    line = ("reparam", models.path("digits_vit.onnx"), "-o", tmp_path / "out.onnx", "--calibration", CALIBRATION)
    code, out, _ = run(*line, "--approximate", "--keep-hidden", "0.5", "--branch", "never", "--align", "16")
    assert code == 0
    assert re.search(r"By approximate-ffn +channels +change +MACs\n  node_MatMul_", out)


def test_reparam_of_a_plain_network_warns(run, tmp_path):
    code, _, err = run("reparam", DIGITS, "-o", tmp_path / "out.onnx")
    assert (code, err.count("No FFN has channels that bypass the activation")) == (0, 1)


def test_inspect_lists_idle_channels(run):
    code, out, _ = run("inspect", REPAVIT, "--idle")
    assert code == 0
    assert re.search(r"FFNs +hidden  idle  dead  weights  folded\n  node_MatMul_46 +64 +48 +0 +2,048 +37.5%\n", out)
    assert "  Folding the idle channels leaves 37.5% of these weights and MACs: channelfold reparam\n" in out
    code, out, _ = run("inspect", DIGITS, "--idle")
    assert "  No FFN was found.\n" in out


def test_prune_shows_each_group(run, tmp_path):
    line = ("prune", DIGITS, "-o", tmp_path / "out.onnx", "--calibration", CALIBRATION)
    code, out, _ = run(*line, "--keep-macs", "0.5", "--align", "4", "--exclude", "/stem/*")
    assert code == 0
    assert re.search(r"Cut +op +channels  kept  params saved  MACs saved\n", out)
    assert re.search(r"  MACs: [\d,]+ -> [\d,]+, (4\d|50).\d% kept\n", out)
    assert "  The cut equals the same channels silenced, to " in out
    assert "its 10 channels stay" not in out
    assert "1 x it is the output 'logits' of the model" in out


def test_prune_keeps_to_the_budget(run, tmp_path):
    for option, key in (("--keep-params", "parameters"), ("--keep-macs", "macs")):
        code, out, _ = run("prune", DIGITS, "-o", tmp_path / "out.onnx", option, "0.6", "--json")
        record = json.loads(out)
        assert (code, record["command"]) == (0, "prune")
        assert record["output"][key] <= 0.6 * record["model"][key]


def test_prune_of_dead_channels(run, tmp_path):
    code, _, err = run("prune", DIGITS, "-o", tmp_path / "out.onnx", "--dead")
    assert (code, err.count("No channel was removed: channelfold inspect --groups")) == (0, 1)


def test_inspect_lists_channel_groups(run):
    code, out, _ = run("inspect", DIGITS, "--groups")
    assert code == 0
    assert re.search(r"Channel groups +channels  prunable +params +MACs  writers  readers\n", out)
    assert re.search(r"  [\d,]+ of [\d,]+ channels can be cut, \d+.\d%\n", out)
    assert "  10 x stays: it is the output 'logits' of the model\n" in out


def test_smooth_on_random_data_warns(run, tmp_path):
    code, _, err = run("smooth", DIGITS, "-o", tmp_path / "out.onnx", "--random", "4")
    assert code == 0
    assert "warning: calibration data: The inputs are random" in err


def test_inspect_before_and_after(run, tmp_path):
    def outliers(path: Path) -> float:
        code, out, _ = run("inspect", path, "--calibration", CALIBRATION)
        (line,) = [line for line in out.splitlines() if "/depthwise/conv/Conv" in line]
        assert (code, "outliers: the largest channel" in out) == (0, True)
        return float(line.split()[-2])

    assert run("smooth", DIGITS, "-o", tmp_path / "s.onnx", "--method", "repq", "--calibration", CALIBRATION)[0] == 0
    assert (outliers(DIGITS), outliers(tmp_path / "s.onnx")) == (8.1, 1.0)


def test_inspect_lists_every_linear_node(run):
    code, out, err = run("inspect", DIGITS)
    assert (code, err) == (0, "")
    assert "5 of 7 linear nodes" in out
    assert "/depthwise/conv/Conv" in out
    assert "outliers" not in out


def test_no_color_and_no_control_characters_in_a_pipe(run):
    _, out, _ = run("inspect", DIGITS)
    assert "\x1b" not in out


def terminal(*args: str | Path, **environment: str) -> str:
    """What a command shows in a terminal of 80 columns."""
    master, slave = pty.openpty()
    code = "import fcntl, termios, struct, sys; fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 80, 0, 0)); "
    code += "from channelfold import cli; from channelfold.runtime.report import progress; progress.AFTER = 0; "
    code += "cli.main(sys.argv[1:])"
    env = (
        {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "TERM")}
        | {"TERM": "xterm"}
        | environment
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=slave, stderr=slave, env=env
    ) as process:
        os.close(slave)
        shown = b""
        while chunk := _read(master):
            shown += chunk
    os.close(master)
    assert process.returncode == 0, shown.decode()
    return shown.decode()


def _read(master: int) -> bytes:
    try:
        return os.read(master, 65536)
    except OSError:  # how Linux says that the other end is closed
        return b""


def test_a_terminal_sees_progress_and_colors():
    shown = terminal("diff", DIGITS, DIGITS, "--random", "500")
    assert "compare" in shown
    assert "\x1b[1m" in shown


def test_a_terminal_of_80_columns_has_room_for_sites(tmp_path):
    shown = terminal("smooth", DIGITS, "-o", tmp_path / "s.onnx", "--calibration", CALIBRATION, NO_COLOR="1")
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in shown.splitlines()]
    start = next(place for place, line in enumerate(lines) if line.startswith("By smooth"))
    assert max(map(len, lines[start:])) <= 80
    assert {line.split()[0] for line in lines[start + 1 : start + 3]} == {"/pointwise/conv/Conv", "/head/Gemm"}


def test_no_color_is_respected():
    shown = terminal("diff", DIGITS, DIGITS, "--random", "2", NO_COLOR="1")
    assert not [code for code in ("\x1b[31", "\x1b[32", "\x1b[33", "\x1b[1;3") if code in shown]


def test_a_closed_pipe_is_no_error():
    line = f"{sys.executable} -m channelfold inspect {DIGITS} | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_a_stdout_that_knows_only_ascii(tmp_path):
    (tmp_path / "größe.onnx").write_bytes(DIGITS.read_bytes())
    command = [sys.executable, "-m", "channelfold", "inspect", "größe.onnx"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    out = subprocess.check_output(command, cwd=tmp_path, env=environment, timeout=60)
    assert r"gr\xf6\xdfe" in out.decode("ascii")


def test_a_full_disk_behind_stdout_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "channelfold", "inspect", DIGITS], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (
        1,
        "error: The report cannot be written to stdout (No space left on device)\n",
    )


# ---- gates -------------------------------------------------------------------------------------------------------


def test_a_missed_gate_exits_3_with_everything_written(run, tmp_path):
    line = ("compress", DIGITS, "-o", tmp_path, "--calibration", CALIBRATION, "--min-snr", "200", "--json")
    code, out, err = run(*line)
    assert code == 3
    assert json.loads(out)["accuracy"] == json.loads((tmp_path / "report.json").read_text())["accuracy"]
    assert (tmp_path / "model.onnx").exists()
    assert "error: The accuracy gate was missed: logits has SNR" in err.splitlines()[-1]


GATES = ["--min-snr=20", "--min-cosine=0.999", "--min-agreement=0.99", "--max-rel=0.1"]


def test_gates_that_hold(run):
    assert run("diff", DIGITS, DIGITS, "--random", "8", *GATES)[0] == 0


@pytest.mark.parametrize("gate", GATES)
def test_gates_that_do_not(gate, run, tmp_path):
    model = onnx.load(DIGITS)
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == model.graph.node[-1].input[1]]
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight)[::-1], weight.name))
    onnx.save(model, tmp_path / "upside_down.onnx")
    code, _, err = run("diff", DIGITS, tmp_path / "upside_down.onnx", "--random", "8", gate)
    assert code == 3
    assert "warning: THE OUTPUTS HAVE COLLAPSED" in err  # whatever is asked for, nobody misses this


def test_a_gate_that_nothing_could_meet(fails):
    assert "give 0.99" in fails(2, "diff", DIGITS, DIGITS, "--random", "1", "--min-agreement", "99")


# ---- wrong usage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (("compres", "m.onnx"), "No such command 'compres'. Did you mean 'compress'? See: channelfold --help"),
        (
            ("frobnicate",),
            "Known: build, compress, demo, diff, fold, inspect, prune, quantize, reparam, smooth, sparsify. See",
        ),
        (("fold", "m.onnx", "--outptu", "x"), "--output"),
        (("fold", "m.onnx"), "Missing option '-o' / '--output'. See: channelfold fold --help"),
        (("fold", "-o", "x"), "Missing argument 'MODEL'"),
        (("quantize", "m.onnx", "-o", "x", "--calibrator", "msee"), "'msee' is unknown. Did you mean 'mse'?"),
        (("quantize", "m.onnx", "-o", "x", "--random", "0"), "0 is not in the range"),
        (("compress", DIGITS, "-o", "x", "--recipe", "in8"), "There is no recipe 'in8'. Did you mean 'int8'?"),
        (("compress", DIGITS, "-o", "x", "--recipe", "fold", "--calibrator", "mse"), "has an option 'calibrator'"),
        (("compress", DIGITS, "-o", "x", "--shape", "image:1"), "not of the form NAME:MIN:OPT:MAX"),
        (("diff", DIGITS, DIGITS), "Give --data, or --random N"),
        (("diff", DIGITS, DIGITS, "--data", EVALUATION, "--random", "1"), "Give one of them"),
        (("diff", DIGITS, DIGITS, "--data", "data.py"), "Add --allow-script"),
        (("fold", DIGITS, "-o", DIGITS), "is the model itself"),
        (("smooth", "m.onnx", "-o", "x", "--method", "smothquant"), "Did you mean 'smoothquant'? See"),
        (("smooth", "m.onnx", "-o", "x", "--method", "repq", "--aim", "media"), "Did you mean 'median'? See"),
        (("smooth", "m.onnx", "-o", "x", "--alpha", "0.3"), "Method 'auto' has no option 'alpha'. It is for: smoothq"),
        (("smooth", "m.onnx", "-o", "x", "--method", "reorder", "--no-shift"), "It is for: auto, os-plus, repq, outl"),
        (("smooth", "m.onnx", "-o", "x", "--method", "equalize", "--sigmas", "2"), "Add --absorb-bias"),
        (("smooth", "m.onnx", "-o", "x", "--weight-bits", "1"), "'weight_bits' is 1. Expected 2 to 16"),
        (("reparam", "m.onnx", "-o", "x", "--keep-hidden", "0.5"), "--keep-hidden is for networks that are not folded"),
        (("reparam", DIGITS, "-o", "x", "--approximate"), "it is not said how much to remove. Give one of"),
        (("reparam", DIGITS, "-o", "x", "--approximate", "--branch", "alway"), "Did you mean 'always'? See"),
        (("prune", "m.onnx", "-o", "x"), "How much to prune is not said"),
        (("prune", "m.onnx", "-o", "x", "--keep-macs", "0.5", "--ratio", "0.5"), "found 'keep_macs' and 'ratio'"),
        (("prune", "m.onnx", "-o", "x", "--dead", "--width"), "'remove-dead-channels' has no option 'width'"),
        (("prune", "m.onnx", "-o", "x", "--keep-macs", "0.5", "--dead"), "Dead channels go whatever 'keep_macs' is"),
        (("prune", "m.onnx", "-o", "x", "--ratio", "0.5", "--importance", "l3"), "'l3' is unknown. Did you mean 'l"),
        (("prune", "m.onnx", "-o", "x", "--keep-macs", "50"), "'keep_macs' is 50. Expected a share: 0.5 is half"),
        (("prune", DIGITS, "-o", "x", "--keep-macs", "0.001"), "A budget of 0.001 cannot be reached: the least"),
        (("prune", DIGITS, "-o", "x", "--ratio", "0.5", "--importance", "activation"), "needs calibration data"),
        (("quantize", DIGITS, "-o", "x", "--float-share", "2"), "'float_share' is 2. Expected 0 to 1"),
    ],
    ids=lambda value: " ".join(map(str, value)).replace(str(DIGITS.parent), "") if isinstance(value, tuple) else "",
)
def test_usage_errors(line, expected, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in fails(2, *line)
    assert not list(tmp_path.iterdir())


def test_an_unknown_key_of_a_recipe(fails, tmp_path):
    (tmp_path / "mine.toml").write_text('[[pass]]\nname = "quantize"\ncalibratr = "mse"\n')
    line = fails(2, "compress", DIGITS, "-o", tmp_path / "out", "--recipe", tmp_path / "mine.toml")
    assert "mine.toml: pass 1 ('quantize') has no option 'calibratr'. Did you mean 'calibrator'?" in line


# ---- broken models -----------------------------------------------------------------------------------------------


def test_a_truncated_model(fails, tmp_path):
    (tmp_path / "cut.onnx").write_bytes(DIGITS.read_bytes()[:100_000])
    assert "cut.onnx is truncated or not an ONNX file" in fails(1, "inspect", tmp_path / "cut.onnx")


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" * 100, b"hello world\n"], ids=["empty", "png", "text"])
def test_a_file_that_is_not_onnx(content, fails, tmp_path):
    (tmp_path / "model.onnx").write_bytes(content)
    assert "model.onnx" in fails(1, "fold", tmp_path / "model.onnx", "-o", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("path", ["absent.onnx", "."], ids=["missing", "folder"])
def test_a_model_that_is_no_file(path, fails, tmp_path):
    assert str(tmp_path / path) in fails(1, "inspect", tmp_path / path)


@pytest.fixture
def external(tmp_path):
    """The digits network with its weights in ``weights.bin``; the location that the file names can be changed."""

    def external(location: str = "weights.bin") -> Path:
        model = onnx.load(DIGITS)
        path = tmp_path / "model.onnx"
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        if location != "weights.bin":
            model = onnx.load(path, load_external_data=False)
            for tensor in model.graph.initializer:
                tensor.external_data[0].value = location
            path.write_bytes(model.SerializeToString())
        return path

    return external


def test_missing_external_data(fails, external, tmp_path):
    path = external()
    (tmp_path / "weights.bin").unlink()
    line = fails(1, "fold", path, "-o", tmp_path / "out.onnx")
    assert "weights.bin" in line
    assert "missing" in line


def test_short_external_data(fails, external, tmp_path):
    path = external()
    os.truncate(tmp_path / "weights.bin", 1000)
    line = fails(1, "fold", path, "-o", tmp_path / "out.onnx")
    assert "weights.bin, which has 1000" in line


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "a/../../weights.bin"])
def test_external_data_outside_the_folder(location, fails, external, tmp_path):
    (tmp_path.parent / "weights.bin").write_bytes(bytes(1_000_000))
    line = fails(1, "fold", external(location), "-o", tmp_path / "out.onnx")
    assert "outside the model's folder" in line
    assert location in line


# ---- broken data -------------------------------------------------------------------------------------------------

GOOD = np.zeros((4, 1, 8, 8), np.float32)
NAN = np.where(np.arange(4)[:, None, None, None] == 2, np.float32(np.nan), GOOD)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"imgae": GOOD}, "Did you mean 'imgae'?"),
        ({}, "without a single array"),
        ({"image": GOOD[:, :, :, :7]}, "has shape (4, 1, 8, 7)"),
        ({"image": GOOD.transpose(0, 2, 3, 1)}, "image.transpose(0, 3, 1, 2)"),
        ({"image": GOOD.astype(np.uint8)}, "uint8"),
        ({"image": GOOD.astype(str)}, "image.astype('float32')"),
        ({"image": NAN}, "sample 2: 'image' holds NaN or Inf (64 of 64 values)"),
        ({"image": GOOD[:0]}, "no samples"),
    ],
    ids=["wrong name", "no arrays", "wrong shape", "channels last", "raw bytes", "text", "NaN", "empty"],
)
@pytest.mark.parametrize("role", ["--calibration", "--evaluation"])
def test_data_that_does_not_fit(arrays, expected, role, fails, samples, tmp_path):
    line = ("compress", DIGITS, "-o", tmp_path / "out", role, samples(**arrays))
    if role == "--evaluation":
        line += ("--calibration", CALIBRATION)
    assert expected in fails(1, *line)
    assert not (tmp_path / "out" / "model.onnx").exists()


@pytest.mark.parametrize("line", ["quantize", "smooth", "smooth --method equalize --absorb-bias"])
def test_no_data_at_all(line, fails, tmp_path):
    assert "Give some with --calibration" in fails(1, *line.split(), DIGITS, "-o", tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_a_damaged_data_file(fails, tmp_path):
    (tmp_path / "samples.npz").write_bytes(CALIBRATION.read_bytes()[:5000])
    assert "samples.npz" in fails(
        1, "quantize", DIGITS, "-o", tmp_path / "o.onnx", "--calibration", tmp_path / "samples.npz"
    )


def test_a_script_runs_only_when_allowed(run, tmp_path):
    script = tmp_path / "data.py"
    script.write_text(
        "import numpy as np\nprint('loading')\n"
        "def load_data():\n    yield {'image': np.ones((1, 1, 8, 8), np.float32)}\n"
    )
    code, out, err = run("diff", DIGITS, DIGITS, "--data", script, "--allow-script", "--json")
    assert (code, json.loads(out)["accuracy"]["feeds"]) == (0, 1)
    assert "loading" in err  # what a script prints does not spoil the JSON


# ---- outputs that cannot be written ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["fold", "compress", "build"])
def test_an_output_below_a_file(command, fails, tmp_path):
    (tmp_path / "file").touch()
    line = (command, DIGITS, "-o", tmp_path / "file" / "out")
    line += ("--random", "1") if command == "compress" else ("--data", CALIBRATION) if command == "build" else ()
    assert f"Nothing can be written in {tmp_path / 'file'}" in fails(1, *line)


def test_an_output_that_is_a_folder(fails, tmp_path):
    assert "is a folder" in fails(1, "fold", DIGITS, "-o", tmp_path)


def test_a_full_disk_leaves_nothing_behind(fails, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    line = fails(1, "fold", DIGITS, "-o", tmp_path / "out.onnx")
    assert "No space left on device" in line
    assert "Free some space" in line
    assert not list(tmp_path.iterdir())


def test_a_full_disk_for_temporary_files(fails, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(jobs, "inspect", full)
    expected = "error: No space left on device. Free some space, or set TMPDIR to a larger disk\n"
    assert fails(1, "inspect", DIGITS) == expected


# ---- missing extras, bugs, interruption --------------------------------------------------------------------------


def test_onnxruntime_is_missing(fails, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    line = fails(1, "compress", DIGITS, "-o", tmp_path / "out", "--calibration", CALIBRATION)
    assert "pip install 'channelfold[cpu]'" in line
    assert not (tmp_path / "out").exists()  # found out before the work


def test_tensorrt_is_missing(fails, monkeypatch, tmp_path):
    monkeypatch.setattr("channelfold.runtime.engine.build._installed", lambda package: False)
    line = fails(1, "compress", DIGITS, "-o", tmp_path / "out", "--calibration", CALIBRATION, "--sm", "89")
    assert "channelfold[rtx]" in line
    assert not (tmp_path / "out").exists()


def broken(*_: object, **__: object) -> None:
    raise ZeroDivisionError("float division by zero")


def test_a_bug_is_one_line_that_says_how_to_report_it(fails, monkeypatch):
    monkeypatch.setattr(jobs, "inspect", broken)
    line = fails(1, "inspect", DIGITS)
    assert line == (
        "error: ZeroDivisionError: float division by zero. This is a bug in channelfold. "
        "Run again with --debug, and report what it shows\n"
    )


def test_debug_shows_the_traceback(run, monkeypatch):
    monkeypatch.setattr(jobs, "inspect", broken)
    code, out, err = run("inspect", DIGITS, "--debug")
    assert (code, out) == (1, "")
    assert err.startswith("Traceback (most recent call last):")
    assert "in broken" in err
    assert err.splitlines()[-1].startswith("error: ZeroDivisionError")


def test_interruption_exits_130(run, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "inspect", interrupted)
    code, out, err = run("inspect", DIGITS)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1].startswith("interrupted: ")


@pytest.mark.parametrize("kind", ChannelfoldError.__subclasses__(), ids=lambda kind: kind.__name__)
def test_every_error_has_its_exit_code(kind, fails, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise kind("It went\nwrong", "Do this")

    monkeypatch.setattr(jobs, "inspect", fail)
    assert fails(kind.exit_code, "inspect", DIGITS) == "error: It went wrong. Do this\n"
