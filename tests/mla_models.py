"""Tiny models of the MLA families: their configs, and what transformers and llama.cpp's converter make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reapc.arch.spec import LayerSpec, ModelSpec, TensorGroup, TensorSpec

# transformers knows Kimi-K2 as the class that it is.
TRANSFORMERS_TYPE = {"kimi_k2": "deepseek_v3"}


def transformers_model(config: dict[str, Any]) -> Any:
    """transformers' model of ``config``, on the device that is current.

    It does not read the published names of the vision keys, and has Kimi-K2.5's numbers for defaults.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    return auto.from_config(transformers_config(config))


def transformers_config(config: dict[str, Any]) -> Any:
    """transformers' config of the published one."""
    from transformers import AutoConfig

    kept = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config") and k[0] != "_"}
    if "text_config" in kept:
        text = {k: v for k, v in kept["text_config"].items() if k != "quantization_config"}
        kept["text_config"], kept["vision_config"] = text, own_names(kept["vision_config"])
        kept["projection_hidden_size"] = kept["vision_config"]["hidden_size"]
    model_type = TRANSFORMERS_TYPE.get(config["model_type"], config["model_type"])
    return AutoConfig.for_model(model_type, **kept)


def own_names(vision: dict[str, Any]) -> dict[str, Any]:
    """transformers' names of the published vision keys."""
    kept = {k.removeprefix("vt_").removeprefix("init_"): v for k, v in vision.items()}
    return {k: v for k, v in kept.items() if k[0] != "_" and k != "model_type"}


COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 20, "num_experts_per_tok": 2, "n_shared_experts": 1, "vocab_size": 2080, "n_group": 1,
    "topk_group": 1, "norm_topk_prob": True, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 2, "dtype": "bfloat16", "moe_layer_freq": 1,
}  # fmt: skip
INDEX = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
VISION = {
    "patch_size": 4, "init_pos_emb_height": 6, "init_pos_emb_width": 5, "vt_hidden_size": 32,
    "vt_intermediate_size": 48, "vt_num_hidden_layers": 2, "vt_num_attention_heads": 2, "merge_kernel_size": [2, 2],
}  # fmt: skip
V3 = {**COMMON, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 8,
      "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_group": 2, "topk_method": "noaux_tc"}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **COMMON, "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "n_routed_experts": 6,
        "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_shared_experts": 2, "q_lora_rank": None,
        "topk_method": "greedy", "norm_topk_prob": False,
    },
    "deepseek_v3": {**V3, "num_nextn_predict_layers": 1},
    "deepseek_v32": {
        **V3, **INDEX, "model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"],
        "num_nextn_predict_layers": 1,
    },
    "kimi_k2": {**V3, "model_type": "kimi_k2", "n_group": 1, "num_nextn_predict_layers": 0},
    "kimi_k25": {
        "model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"], "dtype": "bfloat16",
        "tie_word_embeddings": False, "text_config": {**V3, "num_nextn_predict_layers": 0}, "vision_config": VISION,
    },
    "glm4_moe_lite": {
        **COMMON, "model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"], "n_routed_experts": 6,
        "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
    },
    "glm_moe_dsa": {
        **COMMON, **INDEX, "model_type": "glm_moe_dsa", "architectures": ["GlmMoeDsaForCausalLM"],
        "n_routed_experts": 6, "num_hidden_layers": 4, "first_k_dense_replace": 2, "num_nextn_predict_layers": 1,
        "indexer_types": ["full", "shared", "full", "shared"],
    },
}  # fmt: skip
TOKENS = ("<sop>", "[gMASK]", "<|user|>", "<|observation|>")  # what the converter asks GLM's tokenizer for

CONVERT = """
import importlib, runpy, sys
from pathlib import Path
script, *folders = sys.argv[1:]
tree = Path(script).parent
sys.path[:0] = [str(tree), str(tree / "gguf-py")]
importlib.import_module("conversion").TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
# It asserts add_bos_token, which transformers 5 does not read from tokenizer_config.json beside a tokenizer.json.
v32 = importlib.import_module("conversion.deepseek").DeepseekV32Model
v32.set_vocab = lambda self: self._set_vocab_gpt2()
for folder in folders:
    sys.argv = [script, folder, "--outfile", folder + "/model.gguf", "--outtype", "bf16"]
    runpy.run_path(script, run_name="__main__")
"""


def mtp_tensors(spec: ModelSpec) -> list[TensorSpec]:
    """The MTP tensors on disk."""
    found = [tensor for group in spec.mtp_outer for tensor in group.expand("", spec.num_experts, None)]
    for layer in spec.mtp_layers:
        for group in layer.kind.tensors:
            found += group.expand(f"{layer.prefix}.", spec.num_experts, layer.index)
    return found


def mend_names(path: Path) -> None:
    """Layers named as published: transformers 5.23 saves Kimi-K2.5's text layers as "blocks", like the tower's."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    old, new = "language_model.model.blocks.", "language_model.model.layers."
    mended = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(mended, path, metadata={"format": "pt"})


def header(path: Path) -> dict[str, tuple[int, ...]]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def gguf_parts(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """What the spec says the converter writes, MTP layers included."""
    found: dict[str, tuple[int, ...]] = {}

    def add(group: TensorGroup, prefix: str) -> None:
        for part in group.gguf:
            assert prefix + part.name not in found
            found[prefix + part.name] = (spec.num_experts, *part.shape) if part.experts else part.shape

    for group in (*spec.outer, *spec.mtp_outer):
        add(group, "")
    layers: tuple[LayerSpec, ...] = (*spec.layers, *spec.mtp_layers)
    for layer in layers:
        for group in layer.kind.tensors:
            add(group, f"blk.{layer.index}.")
    return found
