"""The settings under which the tests of numbers run again: that numpy heeds them."""

from types import SimpleNamespace

import processors
import pytest
from helpers import TESTS, run_python

SEEN = "import processors; print(*processors.optional_features())"


def test_what_the_environment_has_switched_off_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    # Who runs the tests with a feature off gets it back in no setting: the variable is replaced as a whole.
    first, *others = processors._umath().__cpu_dispatch__
    monkeypatch.setenv("NPY_DISABLE_CPU_FEATURES", f"{first}, NOT_OF_NUMPY")

    assert processors.switched_off() == [first]
    for setting in processors.processors().values():
        names = setting["NPY_DISABLE_CPU_FEATURES"].split()
        assert names.count(first) == 1
        assert set(names) <= {first, *others}


@pytest.mark.parametrize("index", range(len(processors.processors())))
def test_numpy_does_without_what_is_switched_off(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = list(processors.processors().values())[index]
    for name, value in setting.items():
        monkeypatch.setenv(name, value)

    # Warnings are errors: numpy would warn of a feature that it needs, or that is not there.
    done = run_python("import warnings; warnings.simplefilter('error'); " + SEEN, check=True)

    off = setting["NPY_DISABLE_CPU_FEATURES"].split()
    assert done.stderr == ""
    assert done.stdout.split() == [name for name in processors.optional_features() if name not in off]


def test_every_setting_runs_the_tests_of_numbers_until_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], *, env: dict[str, str], check: bool) -> SimpleNamespace:
        seen.append((command, env))
        return SimpleNamespace(returncode=0 if len(seen) % 3 else 5)

    wanted = {"one": {"NPY_DISABLE_CPU_FEATURES": "A B"}, "other": {"NPY_DISABLE_CPU_FEATURES": "B"}}
    monkeypatch.setattr(processors, "processors", lambda: wanted)
    monkeypatch.setattr(processors.subprocess, "run", run)

    assert processors.main(["-x"]) == 0
    assert processors.main([]) == 5
    assert [env["NPY_DISABLE_CPU_FEATURES"] for _, env in seen] == ["A B", "B", "A B"]
    for place in processors.NUMBERS:
        assert str(TESTS / place) in seen[0][0]
        assert (TESTS / place).exists()
    assert seen[0][0][-1] == "-x"
