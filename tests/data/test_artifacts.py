"""Artifacts are complete or not there, the same work is not done twice, and other work is not overwritten silently."""

import json
from dataclasses import replace

import pytest

from cvdd_ray.data.artifacts import (
    MANIFEST,
    Artifacts,
    StagePlan,
    first_difference,
    sha256,
    software_versions,
    source_stores,
)
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError

PLAN = StagePlan(
    "synthesize/ipc1",
    {"synthesize": {"lr": 0.25, "betas": (0.5, 0.9)}, "ipc": 1},
    {"prior": "abc"},
    ("cat", "dog"),
    seed=3,
)
FILES = {"a.bin": b"one", "b.bin": b"two"}


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


def commit(artifacts, plan=PLAN, files=FILES):
    return artifacts.commit(plan, files, wall_s=1.23456, facts={"images": 2})


class Failing(Store):
    """A store whose disk is full when a certain file comes."""

    def __init__(self, root, name):
        super().__init__(root)
        self.name = name

    def write(self, name, content):
        if name.endswith(self.name):
            raise OSError("disk full")
        super().write(name, content)


# --- the same work and other work ----------------------------------------------------------------------------------


def test_a_finished_stage_is_found_again_by_an_equal_plan(store):
    artifacts = Artifacts(store)
    assert artifacts.finished(PLAN) is None
    assert artifacts.manifest(PLAN.stage) is None
    made = commit(artifacts)
    found = Artifacts(store).finished(replace(PLAN))
    assert found == made
    assert found.files == {name: sha256(content) for name, content in FILES.items()}
    assert (found.facts, found.wall_s, found.versions) == ({"images": 2}, 1.235, software_versions())
    assert {name: artifacts.read(found, name) for name in FILES} == FILES
    assert found.identity["inputs"] == {"prior": "abc"}
    assert found.identity["classes"] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"settings": {"synthesize": {"lr": 0.1, "betas": (0.5, 0.9)}, "ipc": 1}},
            r"synthesize\.lr = 0\.25, now asked for 0\.1",
        ),
        (
            {"settings": {"synthesize": {"lr": 0.25, "betas": (0.5, 0.99)}, "ipc": 1}},
            r"synthesize\.betas = \[0\.5, 0\.9\]",
        ),
        ({"settings": {**PLAN.settings, "extra": 7}}, r"extra = None, now asked for 7"),
        ({"inputs": {"prior": "xyz"}}, r"inputs\.prior = abc, now asked for xyz"),
        ({"classes": ("dog", "cat")}, r"classes = \['cat', 'dog'\]"),
        ({"seed": 4}, r"seed = 3, now asked for 4"),
    ],
)
def test_other_settings_are_named_and_nothing_is_overwritten(store, change, named):
    commit(Artifacts(store))
    with pytest.raises(ArtifactError, match=named):
        Artifacts(store).finished(replace(PLAN, **change))
    assert Artifacts(store).finished(PLAN) is not None


def test_overwrite_lets_other_settings_replace_the_result(store):
    first = commit(Artifacts(store))
    artifacts, other = Artifacts(store, overwrite=True), replace(PLAN, seed=4)
    assert artifacts.finished(PLAN) == first  # equal work is still not done again
    assert artifacts.finished(other) is None
    made = commit(artifacts, other, {"a.bin": b"three"})
    assert Artifacts(store).finished(other) == made
    assert Artifacts(store).read(made, "a.bin") == b"three"
    with pytest.raises(ArtifactError, match="seed = 4, now asked for 3"):
        Artifacts(store).finished(PLAN)


def test_content_depends_on_the_files_alone(store):
    one = commit(Artifacts(store))
    other = Artifacts(store).commit(
        replace(PLAN, stage="elsewhere", seed=9), dict(reversed(FILES.items())), wall_s=9, facts={}
    )
    assert one.content == other.content
    changed = commit(Artifacts(store), replace(PLAN, stage="third"), {**FILES, "a.bin": b"One"})
    renamed = commit(Artifacts(store), replace(PLAN, stage="fourth"), {"A.bin": b"one", "b.bin": b"two"})
    assert len({one.content, changed.content, renamed.content}) == 3


def test_fingerprint_depends_on_everything_in_the_plan():
    plans = [
        PLAN, replace(PLAN, stage="s"), replace(PLAN, seed=4), replace(PLAN, classes=("dog", "cat")),
        replace(PLAN, inputs={}), replace(PLAN, settings={"ipc": 1}),
    ]  # fmt: skip
    assert len({plan.fingerprint() for plan in plans}) == len(plans)
    reordered = replace(PLAN, settings=dict(reversed(PLAN.settings.items())))
    assert reordered.fingerprint() == PLAN.fingerprint()


def test_partial_results_of_other_settings_never_mix_and_go_with_the_commit(store):
    artifacts = Artifacts(store)
    mine, other = artifacts.partial(PLAN), artifacts.partial(replace(PLAN, seed=4))
    assert mine != other
    assert mine.startswith("synthesize/ipc1/partial/")
    store.write(f"{mine}/group0", b"x")
    store.write(f"{other}/group0", b"y")
    commit(artifacts)
    assert store.names(PLAN.stage) == [f"{PLAN.stage}/{name}" for name in ("a.bin", "b.bin", MANIFEST)]


def test_a_stage_below_another_one_is_its_own(store):
    commit(Artifacts(store))
    deeper = replace(PLAN, stage="synthesize/ipc1/deeper")
    assert Artifacts(store).finished(deeper) is None
    commit(Artifacts(store), deeper)
    assert Artifacts(store).finished(PLAN).stage == PLAN.stage


def test_first_difference_descends_into_nested_values():
    assert first_difference({"a": {"b": [1, 2]}}, {"a": {"b": [1, 2]}}) is None
    assert first_difference({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}) == ("a.b", [1, 2], [1, 3])
    assert first_difference({"a": 1, "c": 2}, {"a": 1}) == ("c", 2, None)
    assert first_difference({"a": {"b": 1}}, {"a": 5}) == ("a", {"b": 1}, 5)


# --- complete or not there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("crash", ["a.bin", "b.bin", MANIFEST])
def test_a_crash_before_the_manifest_leaves_the_stage_unfinished(store, crash):
    store.write(f"{Artifacts(store).partial(PLAN)}/group0", b"kept")
    with pytest.raises(OSError, match="disk full"):
        commit(Artifacts(Failing(store.root, crash)))
    assert Artifacts(store).finished(PLAN) is None
    with pytest.raises(ArtifactError, match=r"not finished; make it with `cvdd synthesize`"):
        Artifacts(store).require(PLAN.stage, "synthesize")
    assert store.read(f"{Artifacts(store).partial(PLAN)}/group0") == b"kept"  # so that the work can go on
    commit(Artifacts(store))
    assert Artifacts(store).finished(PLAN) is not None


@pytest.mark.parametrize("crash", ["a.bin", "b.bin", MANIFEST])
def test_a_crash_while_replacing_leaves_neither_the_old_nor_a_mixed_result(store, crash):
    commit(Artifacts(store))
    other = replace(PLAN, seed=4)
    with pytest.raises(OSError, match="disk full"):
        commit(Artifacts(Failing(store.root, crash), overwrite=True), other, {"a.bin": b"1", "b.bin": b"2"})
    assert Artifacts(store).finished(PLAN) is None
    assert Artifacts(store).finished(other) is None


def test_the_manifest_is_written_last(store):
    order = []

    class Listening(Store):
        def write(self, name, content):
            order.append(name)
            super().write(name, content)

    commit(Artifacts(Listening(store.root)))
    assert order == [f"{PLAN.stage}/{name}" for name in (*FILES, MANIFEST)]


@pytest.mark.parametrize("content", [b"One", b"", b"one ", b"two"])
def test_an_altered_file_is_refused(store, content):
    manifest = commit(Artifacts(store))
    store.write(f"{PLAN.stage}/a.bin", content)
    with pytest.raises(ArtifactError, match=r"synthesize/ipc1/a\.bin does not have the sha256"):
        Artifacts(store).read(manifest, "a.bin")
    assert Artifacts(store).read(manifest, "b.bin") == b"two"


def test_a_missing_or_unlisted_file_is_refused(store):
    manifest = commit(Artifacts(store))
    store.delete(f"{PLAN.stage}/a.bin")
    store.write(f"{PLAN.stage}/stray.bin", b"x")
    with pytest.raises(ArtifactError, match=r"a\.bin is not there"):
        Artifacts(store).read(manifest, "a.bin")
    with pytest.raises(ArtifactError, match=r"stray\.bin"):
        Artifacts(store).read(manifest, "stray.bin")


def damaged_manifests():
    whole = {"identity": {"schema": 1, "stage": PLAN.stage}, "files": {}}
    yield b""
    yield b"{"
    yield b"\xff\xfe"
    for content in (
        None, [], 3, "text", {}, {"identity": {}}, {**whole, "unknown": 1}, {**whole, "identity": []},
        {**whole, "identity": None}, {**whole, "identity": {"schema": 1}},
        {**whole, "identity": {"schema": 99, "stage": PLAN.stage}}, {**whole, "identity": {"schema": 1, "stage": "other"}},
    ):  # fmt: skip
        yield json.dumps(content).encode()


@pytest.mark.parametrize("content", damaged_manifests())
def test_a_damaged_manifest_is_refused(store, content):
    store.write(f"{PLAN.stage}/{MANIFEST}", content)
    for ask in (
        lambda a: a.finished(PLAN),
        lambda a: a.require(PLAN.stage, "synthesize"),
        lambda a: a.manifest(PLAN.stage),
    ):
        with pytest.raises(ArtifactError, match=r"manifest\.json is damaged or of another schema"):
            ask(Artifacts(store, overwrite=True))


def test_a_manifest_cut_short_anywhere_is_refused(store):
    commit(Artifacts(store))
    content = store.read(f"{PLAN.stage}/{MANIFEST}")
    for length in range(0, len(content) - 1, 37):
        store.write(f"{PLAN.stage}/{MANIFEST}", content[:length])
        with pytest.raises(ArtifactError, match="damaged"):
            Artifacts(store).manifest(PLAN.stage)


# --- variants side by side, and stages taken over ---------------------------------------------------------------------

OTHER = replace(PLAN, settings={**PLAN.settings, "ipc": 2})


def test_variants_lie_side_by_side_and_the_last_asked_for_is_the_one(store):
    artifacts = Artifacts(store, variants=True)
    assert artifacts.manifest(PLAN.stage) is None
    one, two = commit(artifacts), commit(artifacts, OTHER, {"a.bin": b"2"})
    assert artifacts.folder(one.identity) != artifacts.folder(two.identity)
    assert artifacts.require(PLAN.stage, "synthesize") == two
    assert artifacts.finished(PLAN) == one
    assert artifacts.require(PLAN.stage, "synthesize") == one
    assert (artifacts.read(one, "a.bin"), artifacts.read(two, "a.bin")) == (b"one", b"2")
    assert artifacts.verify(two, "a.bin") == f"{artifacts.folder(two.identity)}/a.bin"
    fresh = Artifacts(store, variants=True)  # another process: nothing is known until it is planned
    assert fresh.manifest(PLAN.stage) is None
    assert fresh.finished(OTHER) == two


def test_an_altered_variant_is_refused_by_its_folder(store):
    artifacts = Artifacts(store, variants=True)
    made = commit(artifacts)
    folder = artifacts.folder(made.identity)
    store.write(f"{folder}/a.bin", b"other")
    with pytest.raises(ArtifactError, match=f"remove the folder {folder}"):
        artifacts.read(made, "a.bin")


@pytest.mark.parametrize("variants_there", [False, True])
@pytest.mark.parametrize("variants_here", [False, True])
def test_a_finished_stage_is_taken_over_from_a_source(tmp_path, variants_there, variants_here):
    there, here = Store(str(tmp_path / "there")), Store(str(tmp_path / "here"))
    made = commit(Artifacts(there, variants=variants_there))
    artifacts = Artifacts(here, variants=variants_here, sources=[there])
    assert artifacts.finished(OTHER) is None
    assert artifacts.finished(PLAN) == made
    assert artifacts.read(made, "b.bin") == b"two"
    alone = Artifacts(here, variants=variants_here)  # it is a stage of its own now
    assert alone.finished(PLAN) == made


@pytest.mark.parametrize("stage", ["pretrain/resnet18", "initialize/ipc1", "stages/pretrain/resnet18/0123"])
def test_a_run_is_a_source_even_without_experts(stage, store):
    with pytest.raises(ArtifactError, match="no finished stage to take over"):
        source_stores([store.root])
    store.write(f"{stage}/{MANIFEST}", b"{}")
    assert [source.root for source in source_stores([store.root])] == [store.root]


def test_a_source_does_not_replace_what_is_there_unasked(tmp_path):
    there, here = Store(str(tmp_path / "there")), Store(str(tmp_path / "here"))
    commit(Artifacts(there))
    commit(Artifacts(here), OTHER)
    with pytest.raises(ArtifactError, match="ipc = 2, now asked for 1"):
        Artifacts(here, sources=[there]).finished(PLAN)
    assert Artifacts(here, overwrite=True, sources=[there]).finished(PLAN).identity["settings"]["ipc"] == 1


def test_making_names_every_stage_in_one_order(store):
    asked = []

    def exclusive(keys):
        asked.append(list(keys))
        from contextlib import nullcontext

        return nullcontext()

    artifacts = Artifacts(store, variants=True, exclusive=exclusive)
    for plans in ((PLAN, OTHER), (OTHER, PLAN)):
        with artifacts.making(*plans):
            pass
    assert asked[0] == asked[1] == sorted(asked[0])
    assert len(set(asked[0])) == 2
