"""RWKV-7 models as GGUF files, for llama.cpp and what is built on it: written with the package gguf, read back here.

Sources: llama.cpp's conversion/rwkv.py (names, metadata), src/models/rwkv7.cpp (what its reader requires).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from src.config import ModelConfig
from src.errors import UserError
from src.files import atomic_write
from src.inference.formats.format import FP16_MAX, Export
from src.inference.formats.gguf_file import BF16, F16, F32, Q8_0, Q8_0_BLOCK, GGUFFile, read_gguf_file
from src.inference.formats.gguf_tensors import Stored, from_gguf, is_large, to_gguf
from src.inference.formats.gguf_tokenizer import tokenizer_metadata
from src.inference.formats.lazy import LazyWeights
from src.model.layers import LAYER_NORM_EPS
from src.model.weights import Weights

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURE = "rwkv7"
# --type -> type of the large matrices, and general.file_type (llama.h: LLAMA_FTYPE_...)
TYPES = {"f16": (F16, 1), "f32": (F32, 0), "bf16": (BF16, 32), "q8_0": (Q8_0, 7)}
CONTEXT_LENGTH = 1048576  # what converters write for a model without a limit
HEAD_SIZE_MULTIPLE = 64  # with others llama.cpp's CPU kernel computes wrong sums
QUANTISED_ROWS = 4096


def load_writer() -> type[GGUFWriter]:
    """The writer of the package gguf. Raises UserError where it isn't installed."""
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise UserError("needs the package gguf", flag="format", given="gguf", advice="pip install gguf") from error
    return GGUFWriter


def write_gguf(export: Export, path: Path) -> None:
    """Write a model with its tokenizer, a tensor at a time.

    Raises UserError when llama.cpp couldn't run the model, when the tokenizer can't be expressed, and for a value that
    fp16 can't hold; OSError.
    """
    assert export.tokenizer is not None
    _check_sizes(export.config, export.type)
    tensors = list(to_gguf(export.weights, export.config, TYPES[export.type][0]))
    metadata = {
        **_general_metadata(export, tensors),
        **_model_metadata(export.config),
        **tokenizer_metadata(export.tokenizer, export.config.vocab_size),
    }
    write_tensors(path, metadata, tensors)


def write_tensors(path: Path, metadata: Mapping[str, Any], tensors: list[Stored]) -> None:
    """Write a GGUF file of these keys and tensors, one after the other. Raises UserError and OSError."""
    writer_class = load_writer()
    with atomic_write(path) as file:
        writer = writer_class(file.name, metadata["general.architecture"])
        try:
            for key, value in metadata.items():
                if key != "general.architecture":  # which the writer adds itself
                    _add(writer, key, value)
            for tensor in tensors:
                _add_info(writer, tensor)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(_encode(tensor.make(), tensor.kind, tensor.ours))
        finally:
            writer.close()


def _check_sizes(config: ModelConfig, type: str) -> None:
    """Raises UserError for sizes with which llama.cpp computes other results, or none."""
    if config.head_size % HEAD_SIZE_MULTIPLE:
        raise UserError(
            f"llama.cpp computes heads of {HEAD_SIZE_MULTIPLE} or multiples of it; this model has {config.head_size}",
            flag="format",
            given="gguf",
            advice="use --format safetensors",
        )
    if type == "q8_0" and config.dim_ffn % Q8_0_BLOCK:
        raise UserError(
            f"quantises rows in blocks of {Q8_0_BLOCK}; dim_ffn is {config.dim_ffn}",
            flag="type",
            given=type,
            expected="f16, bf16 or f32",
        )


def _general_metadata(export: Export, tensors: list[Stored]) -> dict[str, Any]:
    load_writer()  # for its message
    from gguf import size_label

    return {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": export.title,
        "general.size_label": size_label(sum(math.prod(tensor.shape) for tensor in tensors), 0, 0, 0),
        "general.file_type": TYPES[export.type][1],
        "general.quantization_version": 2,
    }


def _model_metadata(config: ModelConfig) -> dict[str, Any]:
    # Block 0 has copies of a1 in the place of v1: in a model of one layer they are all there is.
    value_rank = config.d_mv_lora if config.n_layer > 1 else config.d_aaa_lora
    sizes = {
        "context_length": CONTEXT_LENGTH,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.dim_ffn,
        "attention.layer_norm_epsilon": LAYER_NORM_EPS,
        "attention.head_count": 0,  # must exist, isn't used
        "attention.decay_lora_rank": config.d_decay_lora,
        "attention.iclr_lora_rank": config.d_aaa_lora,
        "attention.value_residual_mix_lora_rank": value_rank,
        "attention.gate_lora_rank": config.d_gate_lora,
        "wkv.head_size": config.head_size,
    }
    return {f"{ARCHITECTURE}.{key}": value for key, value in sizes.items()}


def _add(writer: GGUFWriter, key: str, value: object) -> None:
    """Add a key with the type that llama.cpp expects: u32, f32, bool, string, or an array of i32 or strings."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        raise AssertionError(f"{key}: {type(value)}")


def _add_info(writer: GGUFWriter, tensor: Stored) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType(tensor.kind)
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    n_bytes = math.prod(tensor.shape) // per_block * block_bytes
    writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), n_bytes, raw_dtype=kind)


def _encode(tensor: Tensor, kind: int, name: str) -> npt.NDArray[Any]:
    """The bytes of a tensor in a type of GGUF, as an array. Raises UserError for values beyond fp16."""
    if kind == F32:
        return tensor.float().numpy()
    if kind == BF16:
        return tensor.bfloat16().view(torch.int16).numpy()
    limit = FP16_MAX * (127 if kind == Q8_0 else 1)  # Q8_0's scale, max |x| / 127, is an fp16
    lowest, highest = map(float, tensor.aminmax())
    if not max(-lowest, highest) <= limit:  # not ">", which is false for NaN
        raise UserError(
            f"{name} has a value of {max(-lowest, highest):.6g}, beyond the {limit:.6g} of this type",
            flag="type",
            given="q8_0" if kind == Q8_0 else "f16",
            expected="bf16 or f32",
        )
    return tensor.half().numpy() if kind == F16 else _quantised(tensor)


def _quantised(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """The blocks of Q8_0 of a matrix; rows are in memory as fp32 in pieces."""
    from gguf import GGMLQuantizationType, quants

    pieces = tensor.split(QUANTISED_ROWS)
    return np.concatenate([quants.quantize(rows.float().numpy(), GGMLQuantizationType.Q8_0) for rows in pieces])


def stored_values(name: str, tensor: Tensor, type: str) -> Tensor:
    """The values that a file of --type `type` holds for a parameter of `RWKV7`."""
    kind = TYPES[type][0]
    if not is_large(name) or kind == F32:
        return tensor.float()
    if kind == Q8_0:
        from gguf import GGMLQuantizationType, quants

        return torch.from_numpy(quants.dequantize(_quantised(tensor), GGMLQuantizationType.Q8_0))
    return tensor.half() if kind == F16 else tensor.bfloat16()


def gguf_weights(path: Path) -> LazyWeights:
    """The tensors in a GGUF file under the names of `RWKV7`, without layer 0's unused ones, in the file's dtypes.

    Raises UserError when the file is cut short, is of another architecture, or quantised in a way that isn't read.
    """
    file = read_model_file(path)
    keys = [f"{ARCHITECTURE}.{key}" for key in ("block_count", "wkv.head_size")]
    n_layer, head_size = (file.metadata.get(key) for key in keys)
    if not (isinstance(n_layer, int) and isinstance(head_size, int) and n_layer > 0 and head_size > 0):
        raise UserError(f"{' and '.join(keys)} are {n_layer} and {head_size}", given=path, expected="two sizes")
    try:
        return from_gguf(file, n_layer, head_size)
    except UserError as error:
        raise UserError(error.problem, given=path, expected="a whole RWKV-7 model") from error


def read_model_file(path: Path) -> GGUFFile:
    """A GGUF file, which is an RWKV-7 model. Raises UserError otherwise."""
    file = read_gguf_file(path)
    architecture = file.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise UserError(f"a model of the architecture {architecture}", given=path, expected=f"{ARCHITECTURE} (RWKV-7)")
    if (kind := file.metadata.get("general.type", "model")) != "model":
        raise UserError(f"a GGUF file of the type {kind}, which changes a base model", given=path, expected="a model")
    if file.metadata.get("split.count") not in (None, 0, 1):
        raise UserError("one of several parts of a model", given=path, advice="join them: llama-gguf-split --merge")
    return file


def read_gguf(path: Path) -> Weights:
    """The weights in a GGUF file in one dtype: that of its matrices if it holds every value, else fp32.

    A bf16 model that was written as BF16 comes back as bf16, although its vectors are stored as F32. Raises UserError
    as `gguf_weights`.
    """
    weights = gguf_weights(path)
    dtype = weights["emb.weight"].dtype
    if not all(_holds(dtype, tensor) for tensor in _values(weights)):
        dtype = torch.float32
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def _values(weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
    return (weights[name] for name in weights)


def _holds(dtype: torch.dtype, tensor: Tensor) -> bool:
    return tensor.dtype == dtype or torch.equal(tensor.float(), tensor.to(dtype).float())
