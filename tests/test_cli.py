"""The command line: exit codes, what goes to stdout and to stderr, terminals, and gates."""

from __future__ import annotations

import html
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from channelfold import models
from channelfold.tests.shipped import CALIBRATION, DIGITS, EVALUATION, REPAVIT

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


def test_the_page_says_how_to_repeat_a_command(run, tmp_path):
    line = ("fold", DIGITS, "-o", tmp_path / "with space.onnx", "--html", tmp_path / "fold.html", "--json")
    _, out, _ = run(*line)
    assert shlex.split(json.loads(out)["line"]) == list(map(str, line))
    assert f"channelfold {json.loads(out)['line']}" in html.unescape((tmp_path / "fold.html").read_text())


def test_compress_writes_what_it_says(run, tmp_path):
    line = ("compress", DIGITS, "-o", tmp_path / "out", "--calibration", CALIBRATION, "--evaluation", EVALUATION)
    options = ("--exclude", "/pointwise/*", "--calibrator", "percentile")
    code, out, _ = run(*line, *options)
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx", "report.html", "report.json"]
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
    assert "  The cut equals a mask of the same channels, to " in out
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


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error_and_do_not_end_up_in_the_model(closed, tmp_path):
    out = tmp_path / "out.onnx"
    command = shlex.join([sys.executable, "-m", "channelfold", "fold", str(DIGITS), "-o", str(out)])
    assert subprocess.run(f"{command} {closed}", shell=True, capture_output=True).returncode == 0
    onnx.checker.check_model(onnx.load(out))
