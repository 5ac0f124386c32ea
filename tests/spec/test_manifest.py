"""Manifests: written and read back, and everything else refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import CLibrary
from hypothesis import given
from hypothesis import strategies as st

from pyfmha.errors import ManifestError
from pyfmha.spec.manifest import SCHEMA, Manifest, parse_manifest, read_manifest

EMPTY = Manifest("id", "0", "3", ())


@pytest.fixture
def manifest(library: CLibrary) -> Manifest:
    """That of the small library."""
    return library.manifest


def test_a_manifest_is_read_back_as_it_was_written(manifest: Manifest) -> None:
    assert parse_manifest(manifest.to_json(), "here") == manifest


def test_equal_manifests_have_the_same_text(manifest: Manifest) -> None:
    assert parse_manifest(manifest.to_json(), "here").to_json() == manifest.to_json()


def test_the_one_in_the_library_is_the_one_beside_it(manifest: Manifest, small_library_path: Path) -> None:
    assert read_manifest(small_library_path.with_suffix(".json")) == manifest


def test_it_says_what_every_image_needs(manifest: Manifest) -> None:
    for _, _, variant in manifest.variants():
        assert [image.arch for image in variant.images] == ["sm_80", "sm_90"]
        for image in variant.images:
            assert image.threads == 32 * image.num_warps
            assert 0 < image.registers <= 255
            assert 0 <= image.shared <= image.shared_limit
            assert image.ptxas


def test_its_architectures_are_those_that_every_variant_has(manifest: Manifest) -> None:
    text = json.loads(manifest.to_json())
    text["functions"][0]["algorithms"][0][0]["images"].pop(0)

    assert manifest.archs() == ("sm_80", "sm_90")
    assert parse_manifest(json.dumps(text), "here").archs() == ("sm_90",)
    assert EMPTY.archs() == ()


@pytest.mark.parametrize("text", ["", "{", "not json", "\0", "[1, 2"])
def test_text_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(ManifestError, match=r"some/file is not JSON.*pyfmha build"):
        parse_manifest(text, "some/file")


@pytest.mark.parametrize("text", ["[]", "{}", "null", "3", '"schema"', '{"name": "package", "version": 1}'])
def test_other_peoples_json_is_refused(text: str) -> None:
    with pytest.raises(ManifestError, match="some/file is not a pyfmha manifest"):
        parse_manifest(text, "some/file")


@pytest.mark.parametrize("schema", [SCHEMA + 1, SCHEMA - 1, str(SCHEMA), None, "x"])
def test_another_schema_version_is_refused_with_both(schema: object) -> None:
    text = json.dumps({**json.loads(EMPTY.to_json()), "schema": schema})

    with pytest.raises(ManifestError) as caught:
        parse_manifest(text, "some/file")

    assert f"schema version {schema!r}, this pyfmha reads {SCHEMA}" in str(caught.value)


def test_a_missing_file_is_an_error_that_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"cannot read the manifest .*absent.json.*pyfmha build"):
        read_manifest(tmp_path / "absent.json")


def test_a_binary_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    file.write_bytes(b"\x7fELF\xff\xfe")

    with pytest.raises(ManifestError, match=r"cannot read the manifest|is not JSON"):
        read_manifest(file)


def paths_of(data: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The path of every value inside parsed JSON."""
    if isinstance(data, dict):
        inside = [paths_of(value, (*path, key)) for key, value in data.items()]
    elif isinstance(data, list):
        inside = [paths_of(value, (*path, index)) for index, value in enumerate(data)]
    else:
        inside = []
    return [path, *(found for paths in inside for found in paths)]


@given(st.data())
def test_a_damaged_value_is_refused_or_read_as_valid_but_never_crashes(
    small_library_path: Path, data: st.DataObject
) -> None:
    content = json.loads(small_library_path.with_suffix(".json").read_text())
    path = data.draw(st.sampled_from(paths_of(content)[1:]))
    damage = data.draw(st.sampled_from(["remove", None, -1, 1.5, True, "text", [], {}, [[]], {"a": "b"}]))
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    if damage == "remove":
        del holder[path[-1]]
    else:
        holder[path[-1]] = damage

    try:
        read = parse_manifest(json.dumps(content), "some/file")
    except ManifestError:
        return
    assert parse_manifest(read.to_json(), "again") == read


DAMAGED = {
    "markup is text": ("pyfmha", "0[/b]", None),
    "lone surrogate": ("triton", "\ud800", "text expected"),
    "control character": ("triton", "3\x1b[2J", "text expected"),
    "not ASCII": ("build_id", "é", "text expected"),
    "nested schema": ("schema", [[[[[[[[1]]]]]]]], "schema version"),
    "true is not 1": ("schema", True, "schema version True"),
    "1.0 is not 1": ("schema", 1.0, "schema version 1.0"),
    "surrogate in schema": ("schema", "\ud800", "schema version"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_text_and_schema_are_checked(case: str) -> None:
    key, value, message = DAMAGED[case]
    text = json.dumps({**json.loads(EMPTY.to_json()), key: value})

    if message is None:
        assert getattr(parse_manifest(text, "some/file"), key) == value
        return
    with pytest.raises(ManifestError, match=message) as caught:
        parse_manifest(text, "some/file")
    str(caught.value).encode()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", 10**400),
        ("size", 1 << 63),
        ("registers", True),
        ("dependent", 1),
        ("cluster", 1),
        ("cluster", None),
        ("arch", "x"),
        ("arch", "sm_"),
        ("arch", "sm_٣"),
        ("arch", "sm_90\n"),
        ("arch", "sm_" + "9" * 5000),
        ("constants", [["N", 1]]),
        ("constants", {"N": {"tensor": "X"}}),
        ("constants", {"N": [1, {"dtype": "fp17"}]}),
        ("grid", ["\ud800", "1", "1"]),
        ("ptxas", "13\n4"),
    ],
)
def test_what_an_image_holds_is_checked(manifest: Manifest, key: str, value: object) -> None:
    content = json.loads(manifest.to_json())
    content["functions"][0]["algorithms"][0][0]["images"][0][key] = value

    with pytest.raises(ManifestError, match="some/file is damaged"):
        parse_manifest(json.dumps(content), "some/file")


def test_names_of_the_users_own_need_not_be_ascii(manifest: Manifest) -> None:
    content = json.loads(manifest.to_json())
    image = content["functions"][0]["algorithms"][0][0]["images"][0]
    image["constants"], image["grid"] = {"GRÖSSE": 64}, ["n // GRÖSSE", "1", "1"]

    assert parse_manifest(json.dumps(content), "some/file").to_json() == json.dumps(content, indent=1) + "\n"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": ' + '{"a":' * 100_000, "9" * 5000])
def test_text_too_deep_or_large_to_read_is_refused(text: str) -> None:
    with pytest.raises(ManifestError, match="some/file is not"):
        parse_manifest(text, "some/file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(name="rm -rf; x"), "a name expected, got 'rm -rf; x'"),
        (lambda f: f["algorithms"][0][0].update(name=""), "a name expected, got ''"),
        (lambda f: f.update(algorithms=[]), "there are no algorithms of a function"),
        (lambda f: f["algorithms"].append([]), "there are no variants of an algorithm"),
        (lambda f: f["algorithms"][0][0].update(images=[]), "there are no images of a variant"),
        (lambda f: f["algorithms"][0][0]["images"].append(f["algorithms"][0][0]["images"][0]), "one image for sm_80"),
        (lambda f: f["algorithms"][0][0]["images"][0].update(grid=[]), "there are no expressions of a grid"),
        (lambda f: f.update(arguments=[]), "there are no arguments of a function"),
        (lambda f: f.update(arguments=[["n", "i32"], ["n", "i32"]]), "more than one argument n"),
        (lambda f: f.update(arguments=[["n", "i33"]]), "unknown type 'i33'"),
        (lambda f: f.update(arguments=[["a b", "i32"]]), "a name expected, got 'a b'"),
    ],
)
def test_what_no_library_can_hold_is_refused(
    manifest: Manifest, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    data = json.loads(manifest.to_json())
    change(data["functions"][0])

    with pytest.raises(ManifestError, match=f"here is damaged .*{re.escape(message)}.*; build it again: pyfmha build"):
        parse_manifest(json.dumps(data), "here")


def test_a_function_is_there_once(manifest: Manifest) -> None:
    data = json.loads(manifest.to_json())
    data["functions"].append(data["functions"][0])

    with pytest.raises(ManifestError, match="more than one function add"):
        parse_manifest(json.dumps(data), "here")


def test_architectures_of_some_functions_only_are_told_apart(manifest: Manifest) -> None:
    data = json.loads(manifest.to_json())
    for algorithm in data["functions"][0]["algorithms"]:
        for variant in algorithm:
            variant["images"] = variant["images"][1:]
    partly = parse_manifest(json.dumps(data), "here")

    assert manifest.archs_in_words() == "sm_80, sm_90"
    assert partly.archs_in_words() == "sm_90; in part sm_80"
    assert [function.archs() for function in partly.functions][:3:2] == [("sm_90",), ("sm_80", "sm_90")]
