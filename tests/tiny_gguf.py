"""Tiny GGUF models with random weights, for tests that need a real engine but no sense in its answers.

Each is written in milliseconds, is smaller than 500 kB and loads in a few. The tokenizer is a byte-level BPE that
holds all 256 bytes, so every UTF-8 text survives a round trip; merges are trained on ASCII only, so a Chinese
character spans three tokens and an emoji four. Control tokens get logits near zero, so greedy decoding goes
on until `max_tokens`; a test that wants an early end biases `END_TOKEN_ID`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt

Architecture = Literal["llama", "gemma2", "gemma3", "mamba", "rwkv7", "jamba", "lfm2"]
Quantisation = Literal["f32", "f16", "q8_0"]

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
START_TOKEN_ID = 0
END_TOKEN_ID = 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SLIDING_WINDOW = 32
"""Tokens that the sliding layers of `gemma2` and `lfm2` look back."""
SHORT_WINDOW = 16
"""The same of `gemma3`."""
RWKV_HEAD_SIZE = 64
"""llama.cpp's CPU code writes past the end of a head that is no multiple of its widest vector, which is 64 floats."""

LORA_MATRICES = ("attn_q", "attn_v", "ffn_down", "ssm_in")
"""What a tiny adapter changes unless it is told otherwise; `ssm_in` is a recurrent model's."""

_MERGES_ARE_TRAINED_ON = (
    "the quick brown fox jumps over the lazy dog and then the dog thinks about what the fox has done to it "
    "please answer the question in one sentence and say why the answer is the right one for this user "
    "system assistant user hello there how are you today I am fine thank you and you are very welcome here "
)

Weights = npt.NDArray[np.float32]


def write_tiny_llama(
    path: Path,
    *,
    seed: int = 0,
    context_length: int = 512,
    chat_template: str | None = CHAT_TEMPLATE,
    layers: int = 2,
    embedding: int = 32,
    heads: int = 2,
    vocabulary_size: int = 320,
    quantisation: Quantisation = "f32",
    architecture: Architecture = "llama",
    pooling: gguf.PoolingType | None = None,
    marks: Sequence[str] = (),
    experts: int = 0,
) -> Path:
    """Write a model and return its path; the same arguments write the same bytes.

    Args:
        path: The file to write.
        seed: Of the weights.
        context_length: What the header says; no tensor depends on it.
        chat_template: Jinja source, or None for a model without one.
        layers: Blocks; every even one (from 0) has a sliding window in `gemma2` and `gemma3`, and is recurrent in the
            hybrids, whose odd ones are attention.
        embedding: Width; a multiple of 32 for `q8_0`; `rwkv7` makes it a multiple of `RWKV_HEAD_SIZE`.
        heads: Attention heads, without grouping.
        vocabulary_size: At least 259 (bytes and control tokens); the rest are merges.
        quantisation: Of the matrices; vectors stay f32.
        architecture: `llama` (full attention), `gemma2` and `gemma3` (sliding window), `mamba` and `rwkv7` (recurrent),
            `jamba` (a hybrid of mamba and full attention) or `lfm2` (one of short convolutions and a sliding window).
        pooling: What the header says of it, as embedding models do, or None to say nothing.
        marks: Further control tokens; they have the last ids.
        experts: What the header claims. No tensor has any and none is said to be used, on which llama.cpp aborts the
            process that loads it.
    """
    if architecture == "rwkv7":
        embedding = -(-embedding // RWKV_HEAD_SIZE) * RWKV_HEAD_SIZE
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny random model")
    writer.add_file_type(
        {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16}.get(
            quantisation, gguf.LlamaFileType.MOSTLY_Q8_0
        )
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(context_length)
    writer.add_embedding_length(embedding)
    writer.add_block_count(layers)
    writer.add_layer_norm_rms_eps(1e-5)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    if experts:
        writer.add_expert_count(experts)
    _add_tokenizer(writer, vocabulary_size, chat_template, marks)
    model = _Model(np.random.default_rng(seed), layers, embedding, heads, vocabulary_size)
    for name, weights in _ARCHITECTURES[architecture](writer, model).items():
        _add_tensor(writer, name, weights, quantisation)
    _finish(writer)
    return path


def write_tiny_lora(
    path: Path,
    base: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float = 8.0,
    matrices: Sequence[str] = LORA_MATRICES,
    gain: float = 1.0,
    architecture: str | None = None,
    quantisation: Quantisation = "f32",
    change: Callable[[dict[str, Weights]], object] = lambda _: None,
) -> Path:
    """Write a random LoRA adapter for a model of `write_tiny_llama` and return its path.

    Args:
        path: The file to write.
        base: The model's file, which says which matrices there are and their shapes.
        seed: Of the weights.
        rank: Columns of B and rows of A.
        alpha: What the header says; the adapter's scale is `alpha / rank`.
        matrices: Names without block and `.weight`; those that the base has are changed in every block.
        gain: About how strong the change is against the matrix itself.
        architecture: What the header says; the base's if not given.
        quantisation: Of A and B.
        change: Called with the tensors before they are written, to spoil them.
    """
    reader = gguf.GGUFReader(base)
    writer = gguf.GGUFWriter(path, architecture or reader.get_field("general.architecture").contents())
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    random = np.random.default_rng(seed)
    tensors: dict[str, Weights] = {}
    for each in reader.tensors:
        inputs, *outputs = (int(length) for length in each.shape)
        if each.name.removesuffix(".weight").rpartition(".")[2] not in matrices:
            continue
        strength = np.float32(np.sqrt(gain * rank / alpha) / rank**0.25 / inputs**0.25)
        down, up = (
            ((outputs[0], rank), (inputs, rank)) if "token_embd" in each.name else ((rank, inputs), (*outputs, rank))
        )
        tensors[f"{each.name}.lora_a"] = random.standard_normal(down, np.float32) * strength
        tensors[f"{each.name}.lora_b"] = random.standard_normal(up, np.float32) * strength
    change(tensors)
    for name, weights in tensors.items():
        _add_tensor(writer, name, weights, quantisation)
    _finish(writer)
    return path


def write_merged(path: Path, base: Path, adapter: Path) -> Path:
    """Write the model that `base` is with `adapter` merged into its weights, `W + alpha / rank · B·A`, in f32."""
    reader, delta = gguf.GGUFReader(base), gguf.GGUFReader(adapter)
    writer = gguf.GGUFWriter(path, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(
                field.name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None
            )
    weights = {each.name: np.asarray(each.data, np.float32) for each in delta.tensors}
    alpha = delta.get_field(gguf.Keys.Adapter.LORA_ALPHA).contents()
    for each in reader.tensors:
        merged = np.asarray(each.data, np.float32)
        if f"{each.name}.lora_a" in weights:
            down, up = weights[f"{each.name}.lora_a"], weights[f"{each.name}.lora_b"]
            change = down @ up.T if "token_embd" in each.name else up @ down
            merged = merged + np.float32(alpha / up.shape[1]) * change
        writer.add_tensor(each.name, merged)
    _finish(writer)
    return path


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


BERT_CONTROL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BERT_START_TOKEN_ID = 2
BERT_END_TOKEN_ID = 3


def write_tiny_bert(
    path: Path,
    *,
    seed: int = 0,
    context_length: int = 128,
    pooling: gguf.PoolingType | None = gguf.PoolingType.MEAN,
    layers: int = 2,
    embedding: int = 32,
    heads: int = 2,
) -> Path:
    """Write an encoder of the BERT family and return its path; the same arguments write the same bytes.

    Its WordPiece vocabulary holds the letters and digits, alone and inside words, and the words that the llama's merges
    are trained on; another character makes its whole word unknown.

    Args:
        path: The file to write.
        seed: Of the weights.
        context_length: Positions that it knows.
        pooling: What the header says of it, or None to say nothing.
        layers: Blocks.
        embedding: Width.
        heads: Attention heads.
    """
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name("tiny random encoder")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(context_length)
    writer.add_embedding_length(embedding)
    writer.add_feed_forward_length(2 * embedding)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    tokens = _add_word_pieces(writer)
    model = _Model(np.random.default_rng(seed), layers, embedding, heads, len(tokens))
    for name, weights in _bert(model, context_length).items():
        writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _bert(model: _Model, context_length: int) -> dict[str, Weights]:
    width, inner = model.embedding, 2 * model.embedding
    ones, zeros = np.ones(width, np.float32), np.zeros(width, np.float32)
    tensors = {
        "token_embd.weight": model.vocabulary(1.0),
        "position_embd.weight": model.matrix(context_length, width, np.sqrt(width)),
        "token_types.weight": model.matrix(2, width),
        "token_embd_norm.weight": ones,
        "token_embd_norm.bias": zeros,
    }
    for layer in range(model.layers):
        block = f"blk.{layer}"
        for part in ("q", "k", "v", "output"):
            tensors[f"{block}.attn_{part}.weight"] = model.matrix(width, width, 1.8)
            tensors[f"{block}.attn_{part}.bias"] = zeros
        tensors |= {
            f"{block}.attn_output_norm.weight": ones,
            f"{block}.attn_output_norm.bias": zeros,
            f"{block}.ffn_up.weight": model.matrix(inner, width, 2.0),
            f"{block}.ffn_up.bias": np.zeros(inner, np.float32),
            f"{block}.ffn_down.weight": model.matrix(width, inner),
            f"{block}.ffn_down.bias": zeros,
            f"{block}.layer_output_norm.weight": ones,
            f"{block}.layer_output_norm.bias": zeros,
        }
    return tensors


def _add_word_pieces(writer: gguf.GGUFWriter) -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = sorted({word.lower() for word in _MERGES_ARE_TRAINED_ON.split() if len(word) > 1})
    start = "\u2581"
    tokens = [*BERT_CONTROL_TOKENS, *letters, *(start + each for each in [*letters, *",.?!", *words])]
    kinds = [gguf.TokenType.CONTROL] * len(BERT_CONTROL_TOKENS)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (len(tokens) - len(kinds)))
    writer.add_token_type_count(2)
    writer.add_bos_token_id(BERT_START_TOKEN_ID)
    writer.add_sep_token_id(BERT_END_TOKEN_ID)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_mask_token_id(4)
    return tokens


@dataclass(frozen=True, slots=True)
class _Model:
    random: np.random.Generator
    layers: int
    embedding: int
    heads: int
    vocabulary_size: int

    def matrix(self, rows: int, columns: int, gain: float = 1.0) -> Weights:
        """Return weights for `columns` inputs and `rows` outputs that keep the scale of their input times `gain`."""
        weights: Weights = self.random.standard_normal((rows, columns), np.float32)
        return weights * np.float32(gain / np.sqrt(columns))

    def vocabulary(self, gain: float) -> Weights:
        """Return one row a token; those of control tokens are short."""
        rows = self.matrix(self.vocabulary_size, self.embedding, gain * np.sqrt(self.embedding))
        rows[: len(CONTROL_TOKENS)] *= 0.05
        return rows


def _llama(writer: gguf.GGUFWriter, model: _Model) -> dict[str, Weights]:
    writer.add_vocab_size(model.vocabulary_size)
    writer.add_rope_dimension_count(model.embedding // model.heads)
    tensors = _embedding_and_output(model)
    for layer in range(model.layers):
        tensors |= _attention(model, layer)
    _add_attention(writer, model)
    return tensors


def _gemma2(writer: gguf.GGUFWriter, model: _Model) -> dict[str, Weights]:
    _add_attention(writer, model)
    writer.add_key_length(model.embedding // model.heads)
    writer.add_value_length(model.embedding // model.heads)
    writer.add_sliding_window(SLIDING_WINDOW)
    writer.add_attn_logit_softcapping(50.0)
    writer.add_final_logit_softcapping(30.0)
    ones = np.ones(model.embedding, np.float32)
    tensors = {"token_embd.weight": model.vocabulary(0.2), "output_norm.weight": ones}
    for layer in range(model.layers):
        tensors |= _attention(model, layer)
        tensors[f"blk.{layer}.post_attention_norm.weight"] = ones * 2
        tensors[f"blk.{layer}.post_ffw_norm.weight"] = ones * 2
    return tensors


def _gemma3(writer: gguf.GGUFWriter, model: _Model) -> dict[str, Weights]:
    _add_attention(writer, model)
    writer.add_key_length(model.embedding // model.heads)
    writer.add_value_length(model.embedding // model.heads)
    writer.add_sliding_window(SHORT_WINDOW)
    writer.add_sliding_window_pattern([layer % 2 == 0 for layer in range(model.layers)])
    ones = np.ones(model.embedding, np.float32)
    tensors = {"token_embd.weight": model.vocabulary(0.2), "output_norm.weight": ones}
    for layer in range(model.layers):
        tensors |= _attention(model, layer) | _query_and_key_norms(model, layer)
        tensors[f"blk.{layer}.post_attention_norm.weight"] = ones * 3
        tensors[f"blk.{layer}.post_ffw_norm.weight"] = ones * 3
    return tensors


def _mamba(writer: gguf.GGUFWriter, model: _Model) -> dict[str, Weights]:
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    _add_mamba(writer, model)
    tensors = _embedding_and_output(model)
    for layer in range(model.layers):
        tensors |= _mamba_layer(model, layer)
    return tensors


def _jamba(writer: gguf.GGUFWriter, model: _Model) -> dict[str, Weights]:
    _add_hybrid_attention(writer, model)
    _add_mamba(writer, model)
    tensors = _embedding_and_output(model)
    for layer in range(model.layers):
        if layer % 2:
            tensors |= _attention(model, layer)
        else:
            tensors |= _mamba_layer(model, layer) | _feed_forward(model, layer)
            tensors |= {
                f"blk.{layer}.ssm_dt_norm.weight": np.ones(_MAMBA_RANK, np.float32),
                f"blk.{layer}.ssm_b_norm.weight": np.ones(_MAMBA_STATE, np.float32),
                f"blk.{layer}.ssm_c_norm.weight": np.ones(_MAMBA_STATE, np.float32),
            }
    return tensors


def _lfm2(writer: gguf.GGUFWriter, model: _Model) -> dict[str, Weights]:
    convolution = 3
    _add_hybrid_attention(writer, model)
    writer.add_vocab_size(model.vocabulary_size)
    writer.add_shortconv_l_cache(convolution)
    writer.add_sliding_window(SLIDING_WINDOW)
    tensors = _embedding_and_output(model)
    tensors["token_embd_norm.weight"] = tensors.pop("output_norm.weight")
    for layer in range(model.layers):
        if layer % 2:
            tensors |= _attention(model, layer) | _query_and_key_norms(model, layer)
        else:
            tensors |= _feed_forward(model, layer)
            tensors |= {
                f"blk.{layer}.attn_norm.weight": np.ones(model.embedding, np.float32),
                f"blk.{layer}.shortconv.conv.weight": model.matrix(model.embedding, convolution),
                f"blk.{layer}.shortconv.in_proj.weight": model.matrix(3 * model.embedding, model.embedding),
                f"blk.{layer}.shortconv.out_proj.weight": model.matrix(model.embedding, model.embedding, 2.0),
            }
    return tensors


def _rwkv7(writer: gguf.GGUFWriter, model: _Model) -> dict[str, Weights]:
    rank = 8
    writer.add_head_count(0)
    writer.add_layer_norm_eps(1e-5)
    writer.add_feed_forward_length(2 * model.embedding)
    writer.add_wkv_head_size(RWKV_HEAD_SIZE)
    writer.add_token_shift_count(2)
    writer.add_decay_lora_rank(rank)
    writer.add_iclr_lora_rank(rank)
    writer.add_value_residual_mix_lora_rank(rank)
    writer.add_gate_lora_rank(rank)
    ones, zeros = np.ones(model.embedding, np.float32), np.zeros(model.embedding, np.float32)
    tensors = _embedding_and_output(model)
    tensors |= {"output_norm.bias": zeros, "token_embd_norm.weight": ones, "token_embd_norm.bias": zeros}
    for layer in range(model.layers):
        tensors |= _rwkv7_layer(model, layer, rank)
    return tensors


def _rwkv7_layer(model: _Model, layer: int, rank: int) -> dict[str, Weights]:
    width, inner, block = model.embedding, 2 * model.embedding, f"blk.{layer}"
    ones, zeros = np.ones(width, np.float32), np.zeros(width, np.float32)
    tensors = {
        f"{block}.{norm}.{part}": value
        for norm in ("attn_norm", "attn_norm_2", "time_mix_ln")
        for part, value in (("weight", ones), ("bias", zeros))
    }
    for name, bias in (("w", -3.0), ("a", 0.0), ("v", 0.0)):  # of the decay: forgets 3 % a token
        tensors[f"{block}.time_mix_{name}0.weight"] = np.full(width, bias, np.float32)
    for name in ("w", "a", "v", "g"):
        tensors[f"{block}.time_mix_{name}1.weight"] = model.matrix(rank, width)
        tensors[f"{block}.time_mix_{name}2.weight"] = model.matrix(width, rank)
    for name in ("key", "value", "receptance", "output"):
        tensors[f"{block}.time_mix_{name}.weight"] = model.matrix(width, width, 2.0)
    return tensors | {
        f"{block}.time_mix_lerp_fused.weight": np.full((6, 1, 1, width), 0.5, np.float32),
        f"{block}.time_mix_k_k.weight": ones,
        f"{block}.time_mix_k_a.weight": ones,
        f"{block}.time_mix_r_k.weight": model.matrix(1, width)[0],
        f"{block}.channel_mix_lerp_k.weight": np.full((1, 1, width), 0.5, np.float32),
        f"{block}.channel_mix_key.weight": model.matrix(inner, width),
        f"{block}.channel_mix_value.weight": model.matrix(width, inner),
    }


def _embedding_and_output(model: _Model) -> dict[str, Weights]:
    return {
        "token_embd.weight": model.vocabulary(1.0),
        "output.weight": model.vocabulary(0.4),
        "output_norm.weight": np.ones(model.embedding, np.float32),
    }


_MAMBA_STATE, _MAMBA_CONVOLUTION, _MAMBA_RANK = 16, 4, 2


def _add_mamba(writer: gguf.GGUFWriter, model: _Model) -> None:
    writer.add_ssm_conv_kernel(_MAMBA_CONVOLUTION)
    writer.add_ssm_inner_size(2 * model.embedding)
    writer.add_ssm_state_size(_MAMBA_STATE)
    writer.add_ssm_time_step_rank(_MAMBA_RANK)


def _mamba_layer(model: _Model, layer: int) -> dict[str, Weights]:
    inner = 2 * model.embedding
    return {
        f"blk.{layer}.attn_norm.weight": np.ones(model.embedding, np.float32),
        f"blk.{layer}.ssm_in.weight": model.matrix(2 * inner, model.embedding),
        f"blk.{layer}.ssm_conv1d.weight": model.matrix(inner, _MAMBA_CONVOLUTION),
        f"blk.{layer}.ssm_conv1d.bias": np.zeros(inner, np.float32),
        f"blk.{layer}.ssm_x.weight": model.matrix(_MAMBA_RANK + 2 * _MAMBA_STATE, inner, 3.0),
        f"blk.{layer}.ssm_dt.weight": model.matrix(inner, _MAMBA_RANK),
        f"blk.{layer}.ssm_dt.bias": np.full(inner, -5.0, np.float32),  # softplus: forgets 1 % a token
        f"blk.{layer}.ssm_a": -np.tile(np.arange(1, _MAMBA_STATE + 1, dtype=np.float32), (inner, 1)),
        f"blk.{layer}.ssm_d": np.ones(inner, np.float32),
        f"blk.{layer}.ssm_out.weight": model.matrix(model.embedding, inner, 3.0),
    }


def _add_hybrid_attention(writer: gguf.GGUFWriter, model: _Model) -> None:
    """Write the sizes of a hybrid: a block without heads for keys and values is recurrent."""
    writer.add_head_count(model.heads)
    writer.add_head_count_kv([model.heads * (layer % 2) for layer in range(model.layers)])
    writer.add_feed_forward_length(2 * model.embedding)


def _add_attention(writer: gguf.GGUFWriter, model: _Model) -> None:
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.heads)
    writer.add_feed_forward_length(2 * model.embedding)


def _attention(model: _Model, layer: int) -> dict[str, Weights]:
    """Return a block whose answer depends strongly on every earlier token, so that a wrong KV cache shows."""
    width, block = model.embedding, f"blk.{layer}"
    return {
        f"{block}.attn_norm.weight": np.ones(width, np.float32),
        f"{block}.attn_q.weight": model.matrix(width, width, 1.8),
        f"{block}.attn_k.weight": model.matrix(width, width, 1.8),
        f"{block}.attn_v.weight": model.matrix(width, width, 2.0),
        f"{block}.attn_output.weight": model.matrix(width, width, 2.0),
    } | _feed_forward(model, layer)


def _feed_forward(model: _Model, layer: int) -> dict[str, Weights]:
    width, inner, block = model.embedding, 2 * model.embedding, f"blk.{layer}"
    return {
        f"{block}.ffn_norm.weight": np.ones(width, np.float32),
        f"{block}.ffn_gate.weight": model.matrix(inner, width, 2.0),
        f"{block}.ffn_up.weight": model.matrix(inner, width, 2.0),
        f"{block}.ffn_down.weight": model.matrix(width, inner),
    }


def _query_and_key_norms(model: _Model, layer: int) -> dict[str, Weights]:
    """Return norms large enough that attention picks tokens rather than averaging over them."""
    size = np.full(model.embedding // model.heads, 1.7, np.float32)
    return {f"blk.{layer}.attn_q_norm.weight": size, f"blk.{layer}.attn_k_norm.weight": size}


_ARCHITECTURES: dict[Architecture, Callable[[gguf.GGUFWriter, _Model], dict[str, Weights]]] = {
    "llama": _llama,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "mamba": _mamba,
    "rwkv7": _rwkv7,
    "jamba": _jamba,
    "lfm2": _lfm2,
}


def _add_tensor(writer: gguf.GGUFWriter, name: str, weights: Weights, quantisation: Quantisation) -> None:
    is_matrix = weights.ndim == 2 and "ssm_conv1d" not in name and "ssm_a" not in name
    if quantisation == "q8_0" and is_matrix and weights.shape[1] % 32 == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    elif quantisation == "f16" and is_matrix:
        writer.add_tensor(name, weights.astype(np.float16))
    else:
        writer.add_tensor(name, weights)


def _add_tokenizer(
    writer: gguf.GGUFWriter, vocabulary_size: int, chat_template: str | None, marks: Sequence[str] = ()
) -> None:
    letters = list(_byte_letters().values())
    merges = _train_merges(vocabulary_size - len(CONTROL_TOKENS) - len(letters) - len(marks))
    tokens = [*CONTROL_TOKENS, *letters, *("".join(pair) for pair in merges), *marks]
    normal: Any = gguf.TokenType.NORMAL
    kinds = [gguf.TokenType.CONTROL if each in (*CONTROL_TOKENS, *marks) else normal for each in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(START_TOKEN_ID)
    writer.add_eos_token_id(END_TOKEN_ID)
    writer.add_pad_token_id(START_TOKEN_ID)
    writer.add_add_bos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def _byte_letters() -> dict[int, str]:
    """Return GPT-2's printable letter for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return dict(sorted(letters.items()))


def _train_merges(count: int) -> list[tuple[str, str]]:
    """Return the `count` most frequent pairs of the training text, by plain byte-pair encoding."""
    space = _byte_letters()[ord(" ")]
    words = [[space, *word] for word in _MERGES_ARE_TRAINED_ON.split()]
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        if not pairs:
            raise ValueError(f"The training text yields {len(merges)} merges, fewer than the {count} asked for.")
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = [_merge(word, best) for word in words]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for letter in word:
        if merged and (merged[-1], letter) == pair:
            merged[-1] += letter
        else:
            merged.append(letter)
    return merged
