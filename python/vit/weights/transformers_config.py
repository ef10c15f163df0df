"""The config.json beside transformers' weights: each key used, known to mean nothing here, or refused by name.

What the kinds of models share; each kind's own keys are read in its file of `layouts`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from ..support.records import Record
from .layout import Rule, to

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
#: Of training, of other tasks, of texts, or about the file: nothing that an image's features depend on. The second half
#: are settings of generation, which transformers 4 wrote into every config.
IRRELEVANT = (
    *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "name_or_path"),
    *("_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "auto_map"),
    *("initializer_range", "label2id", "id2label", "num_labels", "problem_type", "_output_attentions"),
    *("finetuning_task", "return_dict", "output_hidden_states", "output_attentions", "use_cache", "torchscript"),
    *("gradient_checkpointing", "is_encoder_decoder", "tie_word_embeddings", "_num_labels", "task_specific_params"),
    *("bad_words_ids", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id", "diversity_penalty"),
    *(
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
    ),
    *("forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length"),
    *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "pad_token_id"),
    *("prefix", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id"),
    *("suppress_tokens", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p"),
    *("typical_p", "use_bfloat16"),
)
#: Keys every config of transformers may have from its base class, and the values that mean nothing for a ViT.
INERT: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "layer_types": (None,),
}


def classes_of(record: Record) -> tuple[str, ...]:
    """The names of the classes that were saved."""
    return record.texts("architectures", None) or () if record.raw("architectures", None) is not None else ()


def finish(record: Record) -> None:
    """Refuses keys that nobody has read and that mean something."""
    ignore(record, *IRRELEVANT)
    for key, allowed in INERT.items():
        if record.raw(key, allowed[0]) not in allowed:
            record.refuse(key, f"left out or {allowed[0]}")
    record.finish()


def ignore(record: Record, *keys: str) -> None:
    """Marks keys as read that nothing depends on."""
    for key in keys:
        record.raw(key, None)


def check(record: Record, key: str, allowed: Collection[Any], default: Any) -> None:
    """Refuses other values than the allowed ones."""
    record.choice(key, allowed, default)


def sizes(
    record: Record,
    eps: float,
    patch: int = 16,
    image: int | None = 224,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    hidden: int | None = 3072,
    act: str = "gelu",
    hidden_dropout: str | None = "hidden_dropout_prob",
    dropout: str = "attention_probs_dropout_prob",
    eps_name: str = "layer_norm_eps",
) -> dict[str, Any]:
    """The keys all kinds have, with what a config that leaves them out means."""
    arch: dict[str, Any] = {
        "in_chans": record.integer("num_channels", 3, 1),
        "embed_dim": record.integer("hidden_size", dim, 1),
        "depth": record.integer("num_hidden_layers", depth, 1),
        "num_heads": record.integer("num_attention_heads", heads, 1),
        "patch_size": sides(record, "patch_size", patch),
        "norm_eps": record.number(eps_name, eps, low=0.0, high=1.0),
        "act_layer": ACTIVATIONS[record.choice("hidden_act", ACTIVATIONS, act)],
    }
    if hidden is not None:
        arch["mlp_ratio"] = ratio(record.integer("intermediate_size", hidden, 1), arch["embed_dim"])
    if image is not None:
        arch["img_size"] = sides(record, "image_size", image)
        if any(side % size for side, size in zip(arch["img_size"], arch["patch_size"], strict=True)):
            arch["drop_edge"] = True  # as a convolution does
    for ours, theirs in (("proj_drop_rate", hidden_dropout), ("attn_drop_rate", dropout)):
        if theirs is not None and (rate := record.number(theirs, 0.0, 0.0, 1.0)):
            arch[ours] = rate
    return arch


def ratio(hidden: int, dim: int) -> float:
    """A ratio with int(dim * ratio) == hidden, which plain division misses for some sizes."""
    plain = hidden / dim
    return plain if int(dim * plain) == hidden else math.nextafter(plain, math.inf)


def tower(record: Record, whole: bool, kind: str, *beside: str) -> Record:
    """The record of the image tower: this one, or the part of a model of images and texts."""
    if not whole:
        return record
    ignore(record, "text_config", "text_config_dict", "vision_config_dict", *beside)
    vision = record.record("vision_config", None)
    if vision is None:
        vision = Record({}, f"{record.source}: vision_config")
    vision.choice("model_type", (kind, kind.removesuffix("_vision_model")), kind)
    return vision


def backbone(record: Record) -> None:
    """Which layers a Backbone gives out: no matter of the weights."""
    ignore(record, "out_features", "out_indices", "stage_names", "apply_layernorm", "reshape_hidden_states")
    ignore(record, "return_class_token", "_out_features", "_out_indices")


def attention(block: str) -> tuple[Rule, ...]:
    """q, k, v and the projection behind them, under the names of transformers 4 and 5."""
    return (
        to(
            [f"{block}attention.attention.{part}.{{w}}" for part in ("query", "key", "value")],
            "blocks.{n}.attn.qkv.{w}",
        ),
        to([f"{block}attention.{part}_proj.{{w}}" for part in "qkv"], "blocks.{n}.attn.qkv.{w}"),
        to(block + "attention.output.dense.{w}", "blocks.{n}.attn.proj.{w}"),
        to(block + "attention.o_proj.{w}", "blocks.{n}.attn.proj.{w}"),
    )


def sides(record: Record, key: str, default: int) -> tuple[int, int]:
    """One side or [height, width]."""
    value = record.raw(key, default)
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value, value]
    if not isinstance(value, list) or len(value) != 2 or not all(type(side) is int and side > 0 for side in value):
        record.refuse(key, "a positive whole number or [height, width]")
    return value[0], value[1]
