"""The plugins in C under sanitizers, without memory, ten thousand times, and on two threads."""

import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from described import STRICT
from fake_cuda import FakeCuda
from helpers import LONG, some_of
from plugin_host import HostCalls, build_host
from plugin_host.operators import CHOICES, SHAPES, operators_of, random_values, specs_of
from shared import Shared
from trt_double import BUILD, HALF, RUNTIME, Field, Tensor
from trt_double.twins import Pair, drive, fields_of, spoilt

from pyfmha.aot import Compiler, build
from pyfmha.attention.operator import OPERATOR
from pyfmha.spec.arch import parse_archs

pytest_plugins = ("plugin_host.operators", "plugin_host.attention")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g")
WRAPPED = "-Wl," + ",".join(f"--wrap={name}" for name in ("malloc", "calloc", "strdup", "free"))
BLEND = {"weights": (0.5, 2.0), "masked": 1, "outputs": 2, "mode": "sum"}
TENSORS = [Tensor((3, 64)), Tensor((3, 64), 3), Tensor((3, 64), 0), Tensor((3,), 0)]
"""X, Mask; Y, Total."""


def built_with(compiler: Compiler, shared: Shared, name: str, command: str) -> Path:
    """The library of three operators, by another compiler command."""

    def make(folder: Path) -> Path:
        operators, specs = specs_of(compiler)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CC", command)
            return build(specs, parse_archs(["sm_90"]), folder, jobs=1, operators=operators).library

    return shared.once(name, make)


@pytest.fixture(scope="session")
def counted_path(compiler: Compiler, shared: Shared) -> Path:
    """Its allocations are the program's to count and to refuse; gcc's sanitizers watch."""
    return built_with(compiler, shared, "plugins_counted", f"gcc {' '.join(SANITIZERS)} {WRAPPED}")


@pytest.fixture(scope="session")
def watched_program(shared: Shared) -> Path:
    return shared.once("plugin_host_watched", lambda folder: build_host(folder / "host", *SANITIZERS))


@pytest.fixture
def watched(watched_program: Path, counted_path: Path, tmp_path: Path, fake_cuda: FakeCuda) -> Iterator[HostCalls]:
    (tmp_path / "watched").mkdir()
    copy = Path(shutil.copy(counted_path, tmp_path / "watched" / "libpyfmha.so"))
    calls = HostCalls(watched_program, copy, fake_cuda.path, ASAN_OPTIONS="detect_leaks=0")
    yield calls
    assert calls.close() == ""


def live(host: HostCalls) -> tuple[int, int]:
    """Allocations of the library that were not freed, and how many there were in all."""
    now, made = map(int, host.ask("fail", 0))
    return now, made


@LONG
@pytest.mark.parametrize("name", some_of(CHOICES))
def test_sanitizers_have_nothing_to_say(watched: HostCalls, path: Path, fake_cuda: FakeCuda, name: str) -> None:
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context()
    pair = Pair(path, fake_cuda, operators_of(path)[name], watched)
    chance, lived = random.Random(99), 0
    before = live(watched)[0]
    for _ in range(25):
        plugins = pair.create(spoilt(fields_of(pair.operator, random_values(name, chance)), chance))
        if plugins is not None:
            lived += drive(pair, plugins, chance, SHAPES[name]) != "refused"
            plugins[1].delete()
        del plugins
    assert lived > 2
    assert live(watched)[0] == before
    assert watched.ask("modules") == ["0"]


def whole_life(host: HostCalls, fields: list[Field]) -> list[str]:
    """Every call on one plugin, as far as it comes: the names of those that failed."""
    failed = []
    inputs, outputs = TENSORS[:2], TENSORS[2:]
    built = host.create(host.named("Blend"), "layer", fields, BUILD)
    if built is None:
        return ["create"]
    calls = {
        "types": host.output_types(built, [HALF, 3]) is None,
        "shapes": host.output_shapes(built, [t.shape for t in inputs]) is None,
        "supports": not all(host.supports(built, position, TENSORS) for position in range(4)),
        "configure": host.configure(built, inputs, outputs) != 0,
        "tactics": not host.tactics(built),
        "workspace": host.workspace(built, inputs, outputs) > 1 << 40,
    }
    failed += [name for name, wrong in calls.items() if wrong]
    loaded = host.create(host.named("Blend"), "layer", host.stored_fields(built).read(), RUNTIME)
    attached = loaded and host.attach(loaded)
    if attached is None:
        return [*failed, "create" if loaded is None else "attach"]
    if host.set_tactic(attached, 0):
        failed.append("set_tactic")
    if host.on_shape_change(attached, inputs, outputs):
        failed.append("on_shape_change")
    status = host.enqueue(attached, [1 << 40, 2 << 40], [3 << 40, 4 << 40], 5 << 40, 6)
    assert (status != 0) == ("on_shape_change" in failed)
    if host.clone(attached) is None:
        failed.append("clone")
    return failed


@LONG
def test_without_memory_a_call_fails_with_a_text(watched: HostCalls, path: Path) -> None:
    fields = fields_of(operators_of(path)["Blend"], BLEND)
    assert whole_life(watched, fields) == []  # what is allocated once is
    before, start = live(watched)
    assert whole_life(watched, fields) == []
    kept, end = live(watched)
    assert kept == before
    calls: set[str] = set()
    for number in range(1, end - start + 1):
        lines = len(watched.logger.lines)
        watched.ask("fail", number)
        failed = whole_life(watched, fields)
        said = [line for severity, line in watched.logger.lines[lines:] if severity == 1]
        assert failed, number
        assert said, (number, failed)
        assert any("memory" in line for line in said), (number, said)
        calls.update(failed)
        assert live(watched)[0] == before, (number, failed)
    assert calls >= {"create", "shapes", "configure", "workspace", "attach", "on_shape_change", "clone"}
    assert watched.ask("modules") == ["0"]


def test_ten_thousand_lives_leave_nothing(host: HostCalls, path: Path) -> None:
    operator = operators_of(path)["Blend"]
    plugin = host.create(host.named("Blend"), "layer", fields_of(operator, BLEND), BUILD)
    assert plugin is not None
    assert host.on_shape_change(plugin, TENSORS[:2], TENSORS[2:]) == 0
    failed, grown, _, modules = map(int, host.ask("repeat", plugin.number, host.named("Blend"), 10_000))
    assert failed == 0
    assert grown < 1 << 14  # bytes, in 5,000 lives
    assert modules == 6  # those of the plugin that still lives
    plugin.delete()
    assert host.ask("modules") == ["0"]


def test_ten_thousand_lives_of_attention_leave_nothing(
    host_program: Path, attention_path: Path, fake_cuda: FakeCuda
) -> None:
    host = HostCalls(host_program, attention_path, fake_cuda.path)
    given = {"num_heads": 4, "head_size": 32, "type_id": 1, "softmax_scale": 0.125, "return_lse": 1, "layout": "bshd"}
    creator = host.named("TritonFlashAttention")
    plugin = host.create(creator, "layer", fields_of(OPERATOR, given), BUILD)
    assert plugin is not None
    tensors = [Tensor((1, 700, 4, 32))] * 4 + [Tensor((1, 4, 700), 0)]
    assert host.on_shape_change(plugin, tensors[:3], tensors[3:]) == 0, host.error()
    failed, grown, _, modules = map(int, host.ask("repeat", plugin.number, creator, 10_000))
    assert failed == 0
    assert grown < 1 << 14  # bytes, in 5,000 lives
    assert modules > 0
    plugin.delete()
    assert host.ask("modules") == ["0"]
    assert host.close() == ""


@LONG
def test_two_contexts_on_two_threads(watched: HostCalls, path: Path) -> None:
    plugin = watched.create(watched.named("Blend"), "layer", fields_of(operators_of(path)["Blend"], BLEND), BUILD)
    assert plugin is not None
    assert watched.on_shape_change(plugin, TENSORS[:2], TENSORS[2:]) == 0
    contexts = [watched.ask("context", device)[0] for device in (0, 1)]
    before = watched.launch_count()
    assert watched.ask("threads", plugin.number, 1000, *contexts) == ["0", "0", "6"]  # the modules of the first plugin
    launches = watched.launches(before)
    for device in (0, 1):
        own = [launch for launch in launches if launch.device == device]
        assert len(own) == 2000
        assert {launch.stream for launch in own} == {device + 1}
        assert len({launch.params for launch in own}) == 2
        assert [own[0].params, own[1].params] * 1000 == [launch.params for launch in own]  # one after the other
    plugin.delete()


def test_the_sources_are_strict_c(compiler: Compiler, shared: Shared, plugins_path: Path) -> None:
    """gcc's warnings are errors where the tests' libraries are built, this one and those of random descriptions."""
    assert "-Wconversion" in STRICT
    assert plugins_path.is_file()
    if shutil.which("clang"):
        strict = "clang -Wall -Wextra -Wconversion -Werror"
        assert built_with(compiler, shared, "plugins_clang", strict).is_file()


def test_the_library_needs_libc_alone(path: Path) -> None:
    done = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True)
    undefined = [line.split()[-1] for line in done.stdout.splitlines() if line.split()[-2] in "Uw"]
    assert [name for name in undefined if "@" in name and "@GLIBC_" not in name] == []
    optional = {"__cxa_finalize", "__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    assert {name for name in undefined if "@" not in name} <= optional
    exports = {line.split()[-1] for line in done.stdout.splitlines() if line.split()[-2] == "T"}
    assert {"getCreators", "setLoggerFinder"} <= exports
    needed = subprocess.run(["objdump", "-p", path], capture_output=True, text=True, check=True).stdout
    libraries = {line.split()[1] for line in needed.splitlines() if line.split()[:1] == ["NEEDED"]}
    assert {name.split(".")[0] for name in libraries} <= {
        "libc",
        "libdl",
        "libpthread",
        "libm",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }


@pytest.mark.parametrize(
    ("version", "shown"),
    [
        (9300, "TensorRT 9"),
        (8601, "TensorRT 8"),
        (120000, "TensorRT 12"),
        (20100, "TensorRT-RTX 2"),
        (1000000, "TensorRT 100"),
    ],
)
def test_another_tensorrt_is_refused(host: HostCalls, path: Path, version: int, shown: str) -> None:
    """It is given no creators. One whose logger is known is told why; of a later one no slot is called: each aborts."""
    fields, name = fields_of(operators_of(path)["BiasGelu"], {"scale": 0.5}), host.named("BiasGelu")
    host.ask("version", version)
    said = f"this is {shown} (version number {version}); the library was made for the interfaces of TensorRT 10 to 11"
    count, why = host.ask("creators")
    assert count == "0"
    assert bytes.fromhex(why[1:]).decode() == host.error()
    assert host.error().startswith(said)
    told = [host.error()]
    assert host.create(name, "layer", fields, BUILD) is None  # by a creator of an earlier time
    assert f"BiasGelu layer 'layer': create_plugin: {said}" in host.error()
    told.append(host.error())
    assert [line for _, line in host.logger.lines] == (told if version < 10000 else [])
    for right in (100001, 101500, 110400, 0):  # 0: it does not say
        host.ask("version", right)
        assert host.ask("creators") == [str(len(host.creators)), "-"]
        assert host.create(name, "layer", fields, BUILD) is not None


def test_a_logger_that_comes_later(host: HostCalls) -> None:
    host.ask("logger", 0)
    assert host.create(host.named("BiasGelu"), "layer", [Field("scale", 5, 1, bytes(4))], BUILD) is None
    assert host.logger.lines == []
    assert "field scale is of type INT32; it must be FLOAT32" in host.error()
    host.ask("logger", 1)
    assert host.create(host.named("BiasGelu"), "layer", [Field("scale", 5, 1, bytes(4))], BUILD) is None
    assert [severity for severity, _ in host.logger.lines] == [1]


@pytest.mark.parametrize("version", [100800, 101601, 110000, 110400])
def test_the_logger_of_every_tensorrt_hears_of_it(host: HostCalls, version: int) -> None:
    """TensorRT 10's logger and finder have no version: their function is the first of the table, not the fifth."""
    host.ask("version", version)
    assert host.create(host.named("BiasGelu"), "layer", [Field("scale", 5, 1, bytes(4))], BUILD) is None
    assert [severity for severity, _ in host.logger.lines] == [1]
    assert "field scale is of type INT32; it must be FLOAT32" in host.logger.lines[0][1]


OTHER = """
typedef void function(void);
int heard;
int getInferLibVersion(void) { return 101500; }
static void note(void *self, int severity, const char *text) { heard += self && severity == 1 && text[0]; }
static function *const logger_table[] = {(function *)note};
static function *const *logger[] = {logger_table};
static void *find(void *self) { return self ? logger : 0; }
static function *const finder_table[] = {(function *)find};
function *const *finder[] = {finder_table};
"""


def test_the_tensorrt_that_calls_is_asked_for_its_version(host: HostCalls, tmp_path: Path) -> None:
    """A process may hold two: the one whose finder was given last is TensorRT 10, the one it shows is 11.4."""
    (tmp_path / "other.c").write_text(OTHER)
    other = tmp_path / "libother.so"
    subprocess.run(["gcc", "-shared", "-fPIC", tmp_path / "other.c", "-o", other], check=True)
    assert host.ask("other", f"x{str(other).encode().hex()}") == ["1"]
    assert host.create(host.named("BiasGelu"), "layer", [Field("scale", 5, 1, bytes(4))], BUILD) is None
    assert host.ask("heard") == ["1"]
    assert host.logger.lines == []


def test_what_every_plugin_says_of_itself(host: HostCalls, path: Path) -> None:
    for creator, (name, operator) in enumerate(operators_of(path).items()):
        answer = host.ask("creator", creator)
        texts = [bytes.fromhex(word[1:]).decode() for word in answer[:4]]
        assert texts == [name, operator.version, operator.namespace, "PLUGIN CREATOR_V3ONE"]
        assert answer[4:] == ["1", "0", "0"]
        assert [field for field, _ in host.field_names(creator)] == [field for field, _ in operator.attributes]
    plugin = host.create(host.named("BiasGelu"), "layer", [], BUILD)
    assert plugin is not None
    assert host.ask("others", plugin.number) == ["100", "x", "-1"]
    assert host.core(plugin) == ("BiasGelu", "1", "acme")


def test_there_is_no_python_in_the_process(host: HostCalls) -> None:
    mapped = host.maps()
    assert "libpyfmha.so" in mapped
    assert "libpython" not in mapped
