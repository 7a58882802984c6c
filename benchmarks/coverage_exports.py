"""Exports small networks with random weights: ``VENV/bin/python coverage_exports.py DIR EXPORTER NAME``.

EXPORTER is dynamo18, dynamo23, legacy17 (torch), optimum (optimum-onnx), genai-fp32 or genai-int4 (the builder of
onnxruntime-genai), fused32 or fused16 (ONNX Runtime's transformer optimizer).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

BATCH, PAST, NEW = 2, 5, 4
TINY: dict[str, Any] = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CAUSAL = TINY | {
    "intermediate_size": 128,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE = TINY | {"intermediate_size": 128, "image_size": 32, "patch_size": 8}
SEQ2SEQ: dict[str, Any] = {"vocab_size": 200, "d_model": 64, "decoder_start_token_id": 0, "pad_token_id": 0}


class Cached(nn.Module):
    """A decoder that takes and returns its cache as plain tensors."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, *past):
        cache = hf.DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = found.past_key_values
        tensors = [t for layer in present.layers for t in (layer.keys, layer.values)]
        return (found.logits, *tensors)


class Only(nn.Module):
    """A network with the outputs that are named, from the inputs that are named."""

    def __init__(self, model: nn.Module, inputs: list[str], outputs: list[str], **more: Any):
        super().__init__()
        self.model, self.inputs, self.outputs, self.more = model, inputs, outputs, more

    def forward(self, *args):
        found = self.model(**dict(zip(self.inputs, args, strict=True)), **self.more)
        return tuple(found[name] for name in self.outputs)


Made = tuple[nn.Module, tuple[torch.Tensor, ...], list[str], list[str], dict[str, dict[int, str]]]


def causal(config: Any) -> Made:
    config._attn_implementation, config._experts_implementation = "sdpa", "batched_mm"
    model = hf.AutoModelForCausalLM.from_config(config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    past = [torch.randn(BATCH, heads, PAST, width) for _ in range(2 * config.num_hidden_layers)]
    args = (
        ids(BATCH, NEW),
        torch.ones(BATCH, PAST + NEW, dtype=torch.int64),
        torch.arange(PAST, PAST + NEW).expand(BATCH, -1),
    )
    names = [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)]
    axes = {name: {0: "batch", 1: "tokens"} for name in inputs[:3]} | {n: {0: "batch", 2: "past"} for n in inputs[3:]}
    axes["attention_mask"] = {0: "batch", 1: "total"}
    return Cached(model), (*args, *past), inputs, ["logits", *(f"present.{name}" for name in names)], axes


def plain(
    model: nn.Module, args: dict[str, torch.Tensor], outputs: list[str], free: tuple[str, ...] = (), **more
) -> Made:
    """A network without a cache; the inputs ``free`` have an open second axis, all have an open batch."""
    axes = {name: {0: "batch", 1: "tokens"} if name in free else {0: "batch"} for name in args}
    return Only(model, list(args), outputs, **more), tuple(args.values()), list(args), outputs, axes


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 200, shape)


def pixels(size: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randn(BATCH, channels, size, size)


def bert_config() -> Any:
    return hf.BertConfig(**TINY, intermediate_size=128, max_position_embeddings=64)


def gpt2_config() -> Any:
    return hf.GPT2Config(vocab_size=200, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)


def llama_config() -> Any:
    return hf.LlamaConfig(**CAUSAL)


def t5_config() -> Any:
    return hf.T5Config(
        vocab_size=200, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
    )


def whisper_config() -> Any:
    return hf.WhisperConfig(
        **SEQ2SEQ,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def bert() -> Made:
    args = {
        "input_ids": ids(BATCH, 9),
        "attention_mask": torch.ones(BATCH, 9, dtype=torch.int64),
        "token_type_ids": torch.zeros(BATCH, 9, dtype=torch.int64),
    }
    return plain(hf.BertModel(bert_config()), args, ["last_hidden_state", "pooler_output"], tuple(args))


def t5() -> Made:
    args = {"input_ids": ids(BATCH, 9), "decoder_input_ids": ids(BATCH, 5)}
    return plain(hf.T5ForConditionalGeneration(t5_config()), args, ["logits"], tuple(args), use_cache=False)


def whisper() -> Made:
    args = {"input_features": torch.randn(BATCH, 16, 64), "decoder_input_ids": ids(BATCH, 5)}
    model = hf.WhisperForConditionalGeneration(whisper_config())
    return plain(model, args, ["logits"], ("decoder_input_ids",), use_cache=False)


def clip() -> Made:
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.CLIPConfig(
        text_config=text | {"vocab_size": 200, "max_position_embeddings": 32, "eos_token_id": 199},
        vision_config=text | {"image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    args = {
        "input_ids": ids(BATCH, 9),
        "pixel_values": pixels(),
        "attention_mask": torch.ones(BATCH, 9, dtype=torch.int64),
    }
    return plain(hf.CLIPModel(config), args, ["logits_per_image", "text_embeds", "image_embeds"])


def detr() -> Made:
    backbone = hf.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    config = hf.DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_queries=10,
    )
    args = {"pixel_values": pixels(64), "pixel_mask": torch.ones(BATCH, 64, 64, dtype=torch.int64)}
    return plain(hf.DetrForObjectDetection(config), args, ["logits", "pred_boxes"])


def sam() -> Made:
    config = hf.SamConfig(
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
            "output_channels": 32,
            "mlp_dim": 128,
            "global_attn_indexes": [1],
            "window_size": 4,
            "num_pos_feats": 16,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 4, "mlp_dim": 64, "iou_head_hidden_dim": 32},
    )
    args = {
        "pixel_values": pixels(64),
        "input_points": torch.rand(BATCH, 1, 2, 2) * 64,
        "input_labels": torch.ones(BATCH, 1, 2, dtype=torch.int64),
    }
    return plain(hf.SamModel(config), args, ["iou_scores", "pred_masks"])


def image(model: nn.Module, size: int = 32) -> Made:
    return plain(model, {"pixel_values": pixels(size)}, ["logits"])


def unet() -> Made:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
    )
    args = {
        "sample": pixels(16, 4),
        "timestep": torch.tensor([3.0, 3.0]),
        "encoder_hidden_states": torch.randn(BATCH, 7, 32),
    }
    return plain(model, args, ["sample"])


def vae() -> Made:
    from diffusers import AutoencoderKL

    class Decoded(nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = AutoencoderKL(
                block_out_channels=(16, 32),
                layers_per_block=1,
                norm_num_groups=8,
                sample_size=32,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
            )

        def forward(self, sample):
            return {"sample": self.vae.decode(self.vae.encode(sample).latent_dist.mean).sample}

    return plain(Decoded(), {"sample": pixels()}, ["sample"])


NETWORKS: dict[str, Callable[[], Made]] = {
    "llama": lambda: causal(llama_config()),
    "qwen3": lambda: causal(hf.Qwen3Config(**CAUSAL)),
    "phi3": lambda: causal(hf.Phi3Config(**{k: v for k, v in CAUSAL.items() if k != "head_dim"})),
    "gemma3": lambda: causal(hf.Gemma3TextConfig(**CAUSAL, sliding_window=64, query_pre_attn_scalar=16)),
    "gpt2": lambda: causal(gpt2_config()),
    "gpt_neox": lambda: causal(hf.GPTNeoXConfig(**TINY, intermediate_size=128, max_position_embeddings=64)),
    "mixtral": lambda: causal(hf.MixtralConfig(**CAUSAL, num_local_experts=4, num_experts_per_tok=2)),
    "mamba": lambda: plain(
        hf.MambaForCausalLM(hf.MambaConfig(vocab_size=200, hidden_size=32, num_hidden_layers=2, state_size=8)),
        {"input_ids": ids(BATCH, 6)},
        ["logits"],
        use_cache=False,
    ),
    "bert": bert,
    "t5": t5,
    "whisper": whisper,
    "clip": clip,
    "detr": detr,
    "sam": sam,
    "vit": lambda: image(hf.ViTForImageClassification(hf.ViTConfig(**IMAGE))),
    "deit": lambda: image(hf.DeiTForImageClassification(hf.DeiTConfig(**IMAGE))),
    "swin": lambda: image(
        hf.SwinForImageClassification(
            hf.SwinConfig(image_size=32, patch_size=4, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4)
        )
    ),
    "convnext": lambda: image(
        hf.ConvNextForImageClassification(hf.ConvNextConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1]))
    ),
    "efficientnet": lambda: image(
        hf.EfficientNetForImageClassification(
            hf.EfficientNetConfig(
                width_coefficient=0.25, depth_coefficient=0.25, image_size=64, hidden_dim=320, dropout_rate=0.0
            )
        ),
        64,
    ),
    "unet": unet,
    "vae": vae,
}


def by_torch(name: str, exporter: str, path: Path) -> None:
    model, args, inputs, outputs, axes = NETWORKS[name]()
    lively(model)
    opset = int(exporter[-2:])
    with torch.no_grad():
        if exporter.startswith("legacy"):
            torch.onnx.export(
                model,
                args,
                path,
                dynamo=False,
                input_names=inputs,
                output_names=outputs,
                opset_version=opset,
                dynamic_axes=axes,
            )
            return
        shapes = [dict.fromkeys(axes[one], torch.export.Dim.DYNAMIC) for one in inputs]
        takes_many = isinstance(model, Cached)
        given = (*shapes[:3], tuple(shapes[3:])) if takes_many else (tuple(shapes),)
        torch.onnx.export(
            model,
            args,
            path,
            dynamo=True,
            input_names=inputs,
            output_names=outputs,
            opset_version=opset,
            dynamic_shapes=given,
            external_data=False,
            verbose=False,
        )


def by_optimum(name: str, path: Path) -> None:
    from optimum.exporters.onnx import onnx_export_from_model

    tasks = {
        "llama": (hf.LlamaForCausalLM, llama_config, "text-generation-with-past"),
        "gpt2": (hf.GPT2LMHeadModel, gpt2_config, "text-generation-with-past"),
        "bert": (hf.BertModel, bert_config, "feature-extraction"),
        "t5": (hf.T5ForConditionalGeneration, t5_config, "text2text-generation-with-past"),
        "whisper": (hf.WhisperForConditionalGeneration, whisper_config, "automatic-speech-recognition-with-past"),
    }
    network, config, task = tasks[name]
    model = network(config())
    lively(model)
    folder = path.with_suffix("")
    onnx_export_from_model(model, folder, task=task, do_validation=False)
    found = next(file for part in ("decoder_model_merged.onnx", "model.onnx") if (file := folder / part).exists())
    found.rename(path)


def by_genai(name: str, kind: str, path: Path) -> None:
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    folder = path.with_suffix("")
    model = hf.LlamaForCausalLM(llama_config())
    lively(model)
    model.save_pretrained(folder / "hf")
    tokenizer(folder / "hf")
    where = (None, str(folder / "hf"), str(folder / "out"), kind, "cpu", str(folder / "cache"))
    create_model(*where, **parse_extra_options(*where, []))
    import onnx

    onnx.save(onnx.load(folder / "out/model.onnx"), path)


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(200)}, unk_token="w0"))
    hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0").save_pretrained(folder)


def by_fusion(name: str, half: bool, path: Path) -> None:
    from onnxruntime.transformers import optimizer

    plain_path = path.with_name(f"{name}.legacy17.onnx")
    if not plain_path.exists():
        by_torch(name, "legacy17", plain_path)
    fused = optimizer.optimize_model(str(plain_path), model_type=name, num_heads=4, hidden_size=64)
    if half:
        fused.convert_float_to_float16(keep_io_types=False)
    fused.save_model_to_file(str(path))


def lively(model: nn.Module) -> None:
    """Weights as large as in a trained network: those of a fresh one are so small that every layer is close to none."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                fan = value[0].numel()
                value.normal_(0, fan**-0.5 if "embed" not in name and "wte" not in name else 1.0)
    model.eval()


def main(folder: str, exporter: str, name: str) -> None:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    path = Path(folder, f"{name}.{exporter}.onnx").resolve()
    if exporter == "optimum":
        by_optimum(name, path)
    elif exporter.startswith("genai"):
        by_genai(name, exporter.removeprefix("genai-"), path)
    elif exporter.startswith("fused"):
        by_fusion(name, exporter == "fused16", path)
    else:
        by_torch(name, exporter, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
