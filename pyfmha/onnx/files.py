"""Models in files: read without their weights, written whole and never over the original."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import google.protobuf.message
import onnx
import onnx_ir as ir

from pyfmha.errors import OnnxError, OutputError
from pyfmha.trt.saved import write_whole


def read_model(path: Path | str) -> ir.Model:
    """A model; external weights stay in their files, and are looked at where they are.

    Raises:
        OnnxError: there is none, or it is truncated or invalid.
    """
    path = Path(path)
    if not path.is_file():
        raise OnnxError(f"no model at {path}")
    if path.stat().st_size == 0:
        raise OnnxError(f"{path} is empty")
    try:
        _check(path)
        model = ir.load(path)
    except (google.protobuf.message.DecodeError, onnx.checker.ValidationError) as error:
        raise OnnxError(f"{path} is truncated, or no ONNX model: {_first_line(error)}") from None
    except (OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise OnnxError(f"{path} cannot be read as an ONNX model: {_first_line(error)}") from None
    _check_weights(path, model)
    return model


def _check_weights(path: Path, model: ir.Model) -> None:
    """Refuse files of weights that end before a weight does."""
    for tensor in _external(model):
        file, count = Path(tensor.path), tensor.length or tensor.nbytes
        end = (tensor.offset or 0) + max(count, tensor.nbytes)
        if file.is_file() and file.stat().st_size < end:
            raise OnnxError(
                f"{file}, the weights of {path}, is truncated: {tensor.name} ends at byte {end}, the file at"
                f" {file.stat().st_size}; copy it again"
            )


def _check(path: Path) -> None:
    """ONNX's own checker; an operator that it does not know is none of its business.

    ONNX Runtime's optimizer writes operators of its own, such as SimplifiedLayerNormalization, in ONNX's domain.
    """
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        if "No Op registered for" not in str(error):
            raise


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def external_files(model: ir.Model) -> set[Path]:
    """The files that hold a model's external weights."""
    return {Path(tensor.path).resolve() for tensor in _external(model)}


def _external(model: ir.Model) -> list[ir.ExternalTensor]:
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    return [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]


def check_target(source: Path, target: Path) -> None:
    """Refuse to write over the original.

    Raises:
        OnnxError: the two are one file.
    """
    if target.exists() and (target.is_dir() or os.path.samefile(source, target)):
        raise OnnxError(f"{target} is {'a folder' if target.is_dir() else 'the original'}; name another file with -o")


def write_model(model: ir.Model, target: Path) -> None:
    """Write a model, whole or not at all.

    Beside the original, external weights stay in the files that hold them. In another folder they are copied to
    ``NAME.data`` beside the new model, a tensor at a time.

    Raises:
        OutputError: it cannot be written.
        OnnxError: the weights would be copied over those of the original.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    held = external_files(model)
    if not held or {file.parent for file in held} == {target.parent.resolve()}:
        write_whole(target, ir.serde.serialize_model(model).SerializeToString())
        return
    data = target.with_name(f"{target.name}.data")
    if data.resolve() in held:
        raise OnnxError(f"{data} holds the original's weights; name another file with -o")
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        ir.save(model, folder / target.name, external_data=data.name)
        os.replace(folder / data.name, data)
        os.replace(folder / target.name, target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_report(report: dict[str, Any], target: Path) -> None:
    """Write a report as JSON, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    write_whole(target, (json.dumps(report, indent=1) + "\n").encode())
