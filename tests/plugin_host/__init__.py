"""A program in C that plays TensorRT for a library's plugins, from Python: built, told what to do, its answers read."""

import hashlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fake_cuda import Launch
from trt_double import Field, Tensor, Unknown

SOURCE = Path(__file__).with_name("host.c")


def build_host(output: Path, *flags: str) -> Path:
    """Compile the program."""
    strict = ["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-rdynamic", "-pthread"]
    include = f"-I{SOURCE.parent.parent / 'fake_cuda'}"
    subprocess.run(["gcc", *strict, *flags, include, str(SOURCE), "-o", str(output), "-ldl"], check=True)
    return output


class HostPlugin:
    """One plugin of the program's; deleted with this object."""

    def __init__(self, host: "HostCalls", number: int) -> None:
        self._host, self.number = host, number

    @property
    def num_outputs(self) -> int:
        return int(self._host.ask("outputs", self.number)[0])

    def delete(self) -> None:
        number, self.number = self.number, -1
        if number >= 0 and self._host.running:
            self._host.ask("delete", number)

    def __del__(self) -> None:
        self.delete()


class HostLogger:
    """What the plugins told TensorRT's logger."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []


class HostCalls:
    """See :class:`trt_double.Calls`; made by the program on the plugins of a library."""

    def __init__(self, program: Path, library: Path, driver: Path, **environment: str) -> None:
        self.trt = None
        self.logger = HostLogger()
        self._process = subprocess.Popen(
            [program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"PATH": "/usr/bin:/bin", **environment},
        )
        self.ask("cuda", _hex(str(driver)))
        self.ask("context", 0)
        count = int(self.ask("open", _hex(str(library)))[0])
        self.creators = list(range(count))

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def ask(self, *words: Any) -> list[str]:
        """A command's answer as words."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(" ".join(map(str, words)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self._process.stdout:
            kind, *answer = line.split()
            if kind == "=":
                return answer
            assert kind == "log", line
            self.logger.lines.append((int(answer[0]), _text(answer[1]) or ""))
        _, errors = self._process.communicate()
        raise AssertionError(f"the program ended with {self._process.returncode} at {words[:2]}:\n{errors}")

    def maps(self) -> str:
        """What is mapped into the program's memory."""
        return Path(f"/proc/{self._process.pid}/maps").read_text()

    def close(self) -> str:
        """End the program; what it wrote to stderr, where sanitizers report."""
        _, errors = self._process.communicate()
        assert self._process.returncode == 0, errors
        return errors

    def error(self) -> str:
        """The text of the last failure."""
        return _text(self.ask("error")[0]) or ""

    def named(self, name: str) -> int:
        """A creator by the name of its operator."""
        (found,) = (creator for creator in self.creators if _text(self.ask("creator", creator)[0]) == name)
        return found

    def field_names(self, creator: int) -> list[tuple[str, int]]:
        """Names and types of a creator's fields."""
        return [(field.name, field.type) for field in _fields(self.ask("creator_fields", creator))]

    def _plugin(self, answer: list[str]) -> HostPlugin | None:
        return None if answer == ["null"] else HostPlugin(self, int(answer[0]))

    def create(self, creator: int, name: str, fields: Sequence[Field], phase: int) -> HostPlugin | None:
        words: list[Any] = ["create", creator, _hex(name), phase, len(fields)]
        for field in fields:
            words += [_hex(field.name), field.type, field.length, f"x{field.data.hex()}"]
        return self._plugin(self.ask(*words))

    def output_types(self, plugin: HostPlugin, types: Sequence[int]) -> list[int] | None:
        status, *found = map(int, self.ask("types", plugin.number, len(types), *types, plugin.num_outputs))
        return found if status == 0 else None

    def output_shapes(
        self, plugin: HostPlugin, shapes: Sequence[Sequence[int | None]], values: Sequence[Sequence[int | None]] = ()
    ) -> list[list[int | None]] | None:
        words: list[Any] = ["shapes", plugin.number]
        for listed in (shapes, values):
            words.append(len(listed))
            for shape in listed:
                words += [len(shape), *map(_size, shape)]
        status, *found = self.ask(*words, plugin.num_outputs)
        return list(_shapes(iter(found))) if int(status) == 0 else None

    def supports(self, plugin: HostPlugin, position: int, tensors: Sequence[Tensor]) -> bool:
        return self.ask("supports", plugin.number, position, plugin.num_outputs, *_dynamic(tensors)) == ["1"]

    def configure(self, plugin: HostPlugin, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        return int(self.ask("configure", plugin.number, *_dynamic(inputs), *_dynamic(outputs))[0])

    def workspace(self, plugin: HostPlugin, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        return int(self.ask("workspace", plugin.number, *_dynamic(inputs), *_dynamic(outputs))[0])

    def tactics(self, plugin: HostPlugin) -> list[int] | None:
        status, *found = map(int, self.ask("tactics", plugin.number))
        return found if status == 0 else None

    def timing_cache_id(self, plugin: HostPlugin) -> str | None:
        return _text(self.ask("timing", plugin.number)[0])

    def set_tactic(self, plugin: HostPlugin, tactic: int) -> int:
        return int(self.ask("tactic", plugin.number, tactic)[0])

    def on_shape_change(self, plugin: HostPlugin, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        return int(self.ask("change", plugin.number, *_descs(inputs), *_descs(outputs))[0])

    def enqueue(
        self, plugin: HostPlugin, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> int:
        addresses = [len(inputs), *inputs, len(outputs), *outputs, workspace, stream]
        return int(self.ask("enqueue", plugin.number, *addresses)[0])

    def attach(self, plugin: HostPlugin) -> HostPlugin | None:
        return self._plugin(self.ask("attach", plugin.number))

    def clone(self, plugin: HostPlugin) -> HostPlugin | None:
        return self._plugin(self.ask("clone", plugin.number))

    def stored_fields(self, plugin: HostPlugin) -> "_Stored":
        return _Stored(_fields(self.ask("stored", plugin.number)))

    def core(self, plugin: HostPlugin) -> tuple[str, str, str]:
        name, version, namespace = (_text(word) or "missing" for word in self.ask("core", plugin.number))
        return name, version, namespace

    def destroy(self, plugin: HostPlugin) -> None:
        plugin.delete()

    def launch_count(self) -> int:
        return int(self.ask("launches", 1 << 40)[0])

    def launches(self, start: int = 0) -> list[Launch]:
        """The launches that reached its driver, from one on."""
        words = iter(self.ask("launches", start)[1:])
        found = []
        for image in words:
            digest = hashlib.sha256(bytes.fromhex(image[1:])).hexdigest()
            numbers = [int(next(words)) for _ in range(9)]
            params = tuple(bytes.fromhex(next(words)[1:]) for _ in range(numbers[8]))
            grid, block, stream, device = tuple(numbers[:3]), tuple(numbers[3:6]), numbers[6], numbers[7]
            found.append(Launch("", digest, grid, block, 0, stream, device, False, None, params))
        return found


class _Stored:
    def __init__(self, fields: list[Field]) -> None:
        self._fields = fields

    def read(self) -> list[Field]:
        return self._fields


def _hex(text: str) -> str:
    return f"x{text.encode().hex()}"


def _text(word: str) -> str | None:
    return None if word == "-" else bytes.fromhex(word[1:]).decode(errors="replace")


def _fields(answer: list[str]) -> list[Field]:
    return [
        Field(_text(answer[at]) or "", int(answer[at + 1]), int(answer[at + 2]), bytes.fromhex(answer[at + 3][1:]))
        for at in range(1, len(answer), 4)
    ]


def _size(size: int | None) -> str:
    return "?" if size is None else f"?{int(size)}" if isinstance(size, Unknown) else str(size)


def _shapes(words: Iterator[str]) -> Iterator[list[int | None]]:
    for count in words:
        sizes = [next(words) for _ in range(int(count))]
        yield [None if s == "?" else Unknown(s[1:]) if s[0] == "?" else int(s) for s in sizes]


def _dims(shape: Sequence[int]) -> list[int]:
    return [len(shape), *shape]


def _desc(tensor: Tensor) -> list[int]:
    return [tensor.type, tensor.format, *_dims(tensor.shape)]


def _descs(tensors: Sequence[Tensor]) -> list[int]:
    return [len(tensors), *(word for tensor in tensors for word in _desc(tensor))]


def _dynamic(tensors: Sequence[Tensor]) -> list[int]:
    words = [len(tensors)]
    for tensor in tensors:
        most = tensor.largest or tensor.shape
        words += [*_desc(tensor), *_dims(tensor.smallest or most), *_dims(most)]
    return words
