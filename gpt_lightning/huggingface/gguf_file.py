"""Writes a checkpoint as one GGUF file, which llama.cpp and what is built on it run without us.

The names are those of the `gguf` package, and the weights Hugging Face's, but for two things: a matrix is
[out, in] in every model, and a Llama turns neighbours there, where Hugging Face's turns the halves of a head.
Shapes: H heads, K head_dim.
"""

import errno
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_lightning.checkpoint.atomic import naming, written_file
from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.checkpoint.files import write_error
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.exit_codes import UserError
from gpt_lightning.huggingface.exporting import check_finite
from gpt_lightning.huggingface.families import GPT2, LLAMA, Family, family_of
from gpt_lightning.huggingface.gguf_vocabulary import vocabulary_of
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.rope import speeds_of

DTYPES = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}  # ours -> gguf's
FLOAT16_MAX = torch.finfo(torch.float16).max
FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}


def export_gguf(path: Path, output: Path, dtype: str) -> None:
    """Writes a checkpoint's network and tokenizer; refuses an output that exists."""
    gguf_package()
    if output.exists():
        raise UserError(f"output={output} exists already; name another file, or remove it")
    checkpoint = Checkpoint.open(path).whole()
    check_finite(checkpoint)
    write_gguf(checkpoint.config, checkpoint.weights, checkpoint.tokenizer, output, dtype)


def write_gguf(
    config: GPTConfig, weights: dict[str, Tensor], tokenizer: TextTokenizer, output: Path, dtype: str
) -> None:
    """Writes the file, which gets its name when it is whole."""
    gguf = gguf_package()
    family = family_of(config)
    _check(config, family)
    vocabulary = vocabulary_of(tokenizer, config.vocab_size)
    theirs = weights_to_gguf(weights, config, gguf)
    tensors = {name: _stored(name, weight, dtype, gguf) for name, weight in theirs.items()}
    try:
        with naming(f"output={output}"):
            output.parent.mkdir(parents=True, exist_ok=True)
            with written_file(output) as file:
                writer = gguf.GGUFWriter(file.name, family.model_type)
                writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
                _add_shape(writer, config, family, gguf)
                vocabulary.add_to(writer)
                for name, (array, kind) in tensors.items():
                    writer.add_tensor(name, array, raw_dtype=kind)
                _write(writer)
    except OSError as error:
        raise write_error(output, error) from error


def weights_to_gguf(weights: dict[str, Tensor], config: GPTConfig, gguf: Any) -> dict[str, Tensor]:
    """Makes llama.cpp's weights, in float32, of GPTModel's; a tied head is the token table."""
    family = family_of(config)
    theirs = family.weights_to({name: weight.float() for name, weight in weights.items()}, config)
    if config.tie_embeddings:
        del theirs["lm_head.weight"]
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.model_type)
    names = gguf.get_tensor_name_map(architecture, config.n_layers)
    converted = {}
    for name, weight in theirs.items():
        if ".c_" in name and name.endswith(".weight"):  # GPT-2's Conv1D, which is [in, out]
            weight = weight.t()
        elif family is LLAMA and ".q_proj." in name:
            weight = _as_neighbours(weight, config.n_heads)
        elif family is LLAMA and ".k_proj." in name:
            weight = _as_neighbours(weight, config.kv_heads)
        converted[names.get_name(name, try_suffixes=(".weight", ".bias"))] = weight.contiguous()
    if config.rope_scaling is not None and config.rope_scaling["rope_type"] == "llama3":
        converted["rope_freqs.weight"] = _slowness(config)
    return converted


def _as_neighbours(weight: Tensor, heads: int) -> Tensor:
    """Puts the two rows of each pair that is turned beside each other."""
    halves = weight.unflatten(0, (heads, 2, -1))  # [H, 2, K / 2, ...]
    return halves.transpose(1, 2).flatten(0, 2)


def _slowness(config: GPTConfig) -> Tensor:
    """Returns what llama.cpp divides the speed of each pair by."""
    sizes, cpu = (config.rope_theta, config.head_dim), torch.device("cpu")
    return speeds_of(*sizes, None, cpu)[0] / speeds_of(*sizes, config.rope_scaling, cpu)[0]


def _check(config: GPTConfig, family: Family) -> None:
    """Raises where llama.cpp would compute something else than our network."""
    if family is GPT2 and config.activation != "gelu_tanh":
        option = f"model.config.activation={config.activation}"
        problem = f"{option} is not the GELU of llama.cpp's GPT-2, gelu_tanh"
        raise UserError(f"{problem}; export-hf writes it for other programs")
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "llama3" and family is not LLAMA:
        problem = f"model.config.rope_scaling.rope_type=llama3 is for Llama alone in GGUF, not {family.name}"
        raise UserError(f"{problem}; export-hf writes it for other programs")
    # A file may say them, but they are not read from it.
    for name, value in (("beta_fast", 32), ("beta_slow", 1)):
        if scaling.get(name, value) != value:
            problem = f"model.config.rope_scaling.{name}={scaling[name]} is always {value} in llama.cpp"
            raise UserError(f"{problem}; export-hf writes it for other programs")


def _add_shape(writer: Any, config: GPTConfig, family: Family, gguf: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.n_layers)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.kv_heads)
    if family is GPT2:
        writer.add_layer_norm_eps(config.layer_norm_eps)
        return
    writer.add_layer_norm_rms_eps(config.layer_norm_eps)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    scaling: dict[str, Any] = dict(config.rope_scaling or {})
    if scaling.get("rope_type") in ("linear", "yarn"):  # a llama3's is among the tensors
        factor = float(scaling["factor"])
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(factor)
    if scaling.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(scaling["original_max_position_embeddings"]))
        if "attention_factor" in scaling:  # of which llama.cpp multiplies the usual one in
            writer.add_rope_scaling_attn_factors(scaling["attention_factor"] / (0.1 * math.log(factor) + 1))


def _stored(name: str, weight: Tensor, dtype: str, gguf: Any) -> tuple[Any, Any]:
    """Returns the array to write, and its type: matrices alone are stored in less than float32."""
    kinds = gguf.GGMLQuantizationType
    kind = kinds[DTYPES[dtype]] if weight.ndim > 1 and name != "position_embd.weight" else kinds.F32
    if kind == kinds.Q8_0 and weight.shape[-1] % 32:  # a block of q8_0 is 32 weights of a row
        kind = kinds.F16
    # A block of q8_0 is integers to 127, and a scale in float16.
    greatest = {kinds.F16: FLOAT16_MAX, kinds.Q8_0: 127 * FLOAT16_MAX}.get(kind, math.inf)
    if float(weight.abs().max()) > greatest:
        problem = f"dtype={dtype} cannot hold {name}, which has weights above {greatest:.0f}"
        raise UserError(f"{problem}; choose float32")
    return gguf.quants.quantize(weight.numpy(), kind), kind


def _write(writer: Any) -> None:
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        if error.errno is not None:
            raise
        # numpy's, which says how much of an array was written.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
    finally:
        writer.close()


def gguf_package() -> Any:
    """Imports what few have; raises UserError where it is missing."""
    try:
        import gguf
    except ImportError:
        raise UserError("export-gguf needs gguf; pip install 'gpt_lightning[ecosystem]'") from None
    return gguf
