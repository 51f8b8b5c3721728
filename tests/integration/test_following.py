"""The aliases followed step by step: a real registry, real files, and workers whose answers are written down here."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace

import pytest

from noria.errors import RegistryError
from registry.store import Store
from serving import shadow_state, shadowing, state
from serving.generation import Generation
from serving.ledger import Ledger
from serving.reconcile import Reconciler
from serving.repository import Repository
from serving.state import Desired
from serving.telling import TAG

NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def store(mlflow_url):
    return Store(mlflow_url)


@pytest.fixture(scope="module")
def register(store, make_contents):
    """New versions of the workload with that name."""

    def make(name, count=1):
        contents = make_contents()
        contents = replace(contents, facts=replace(contents.facts, name=name))
        for _ in range(count):
            with store.run(name, "test") as run:
                store.register(run, contents)

    return make


class Followed:
    """A reconciler whose steps this process takes."""

    def __init__(self, store, home):
        self.folder, self.bundles = home / "serving", home / "bundles"
        self.ledger = Ledger(self.folder)
        self.reconciler = Reconciler(store, self.bundles, self.folder)

    def restart(self, store):
        self.reconciler = Reconciler(store, self.bundles, self.folder)

    def asked(self, name):
        return state.read(self.folder / "desired", Desired).get(name)

    def serve(self, name):
        """The workers answer with what is desired, and the registry is told."""
        self.ledger.settled({name: self.asked(name)})
        self.reconciler.step()

    def fail(self, name, reason="The worker was ended by SIGKILL."):
        self.ledger.failed(self.asked(name), Generation(1), reason)
        self.reconciler.step()

    def until(self, condition, seconds=30):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.1)
            self.reconciler.step()


@pytest.fixture
def followed(store, tmp_path):
    return Followed(store, tmp_path)


@pytest.fixture
def unwritable(followed):
    """A file of `desired/` that this process cannot write, until it is said again."""

    def turn(name):
        aside = followed.folder / "desired" / f"{name}.json.{os.getpid()}.aside"
        aside.rmdir() if aside.exists() else aside.mkdir(parents=True)

    return turn


def champion(store, register, followed, name, versions=2):
    """Version 1 of a new workload answers."""
    register(name, versions)
    store.move(name, "champion", 1)
    followed.reconciler.step()
    followed.serve(name)
    assert followed.asked(name).version == 1


def test_a_request_that_could_not_be_written_is_written_later(store, register, followed, unwritable):
    champion(store, register, followed, "unwritten")
    unwritable("unwritten")
    store.move("unwritten", "champion", 2)
    followed.reconciler.step()
    assert followed.asked("unwritten").version == 1
    unwritable("unwritten")
    followed.until(lambda: followed.asked("unwritten").version == 2)
    followed.serve("unwritten")
    assert "replaced version 1" in store.get("unwritten", 2).tags[TAG]


def test_what_the_disk_does_not_take_of_one_workload_holds_up_no_other(store, register, followed, caplog):
    for name in ("a-blocked", "followed"):
        champion(store, register, followed, name)
    for name in ("a-blocked", "followed"):
        store.move(name, "champion", 2)
    kept = followed.bundles / "followed"
    for number in ("3", "4", "1000"):
        (kept / number).mkdir()
        os.utime(kept / number, (1, 1))
    shutil.rmtree(followed.bundles / "a-blocked")
    (followed.bundles / "a-blocked").write_text("no folder")
    followed.reconciler.step()
    assert followed.asked("followed").version == 2
    followed.serve("followed")
    assert "replaced version 1" in store.get("followed", 2).tags[TAG]
    assert not (kept / "3").exists(), "what nobody names goes, and makes room"
    assert "a-blocked is tried again in 1 s." in caplog.text
    (followed.bundles / "a-blocked").unlink()
    followed.until(lambda: followed.asked("a-blocked").version == 2)


def test_a_whole_copy_is_asked_for_again_without_the_registry_with_pauses(store, register, followed):
    champion(store, register, followed, "killed")
    followed.restart(Store(NOWHERE))
    followed.reconciler.step()
    first = followed.asked("killed")
    followed.fail("killed")
    second = followed.asked("killed")
    assert (second.version, second.folder) == (1, first.folder)
    assert second.asked != first.asked
    followed.fail("killed")
    assert followed.asked("killed") == second, "not at once again, and there is nothing to fall back to"
    followed.until(lambda: followed.asked("killed").asked != second.asked)
    followed.serve("killed")
    (followed.bundles / "killed" / "1" / "model.onnx").write_bytes(b"damaged")
    third = followed.asked("killed")
    followed.fail("killed")
    assert followed.asked("killed") == third, "a damaged copy is fetched again, and nobody gives it now"
    followed.reconciler.store = store
    followed.until(lambda: followed.asked("killed").asked != third.asked)


class Refusing(Store):
    """Takes no tags, for as long as `left` says, and moves no alias, for as long as `unmoved` does."""

    left, unmoved = 2, 0

    def tag(self, version, tags):
        if self.left:
            self.left -= 1
            raise RegistryError("MLflow refused: 500")
        super().tag(version, tags)

    def move(self, workload, alias, number):
        if self.unmoved:
            self.unmoved -= 1
            raise RegistryError("MLflow refused: 500")
        super().move(workload, alias, number)


def test_a_tag_that_was_not_taken_is_written_later(mlflow_url, store, register, tmp_path, caplog):
    followed = Followed(Refusing(mlflow_url), tmp_path)
    champion(store, register, followed, "untold")
    followed.until(lambda: TAG in store.get("untold", 1).tags)
    assert "serving since" in store.get("untold", 1).tags[TAG]
    assert caplog.text.count("of untold version 1 is not set yet") == 1
    store.move("untold", "champion", 2)
    followed.reconciler.step()
    followed.reconciler.telling.report("untold", 77, "serving since never")
    followed.serve("untold")
    assert "replaced version 1" in store.get("untold", 2).tags[TAG], "one that is gone holds up no other"


def test_an_alias_that_could_not_be_moved_is_moved_later(mlflow_url, store, register, tmp_path, caplog):
    followed = Followed(Refusing(mlflow_url), tmp_path)
    followed.reconciler.store.left = 0
    champion(store, register, followed, "unmoved")
    store.move("unmoved", "champion", 2)
    followed.reconciler.step()
    followed.reconciler.store.unmoved = 2
    followed.serve("unmoved")
    assert store.version("unmoved", "previous") is None
    followed.until(lambda: store.version("unmoved", "previous") is not None)
    assert store.version("unmoved", "previous").number == 1
    assert caplog.text.count("The alias previous of unmoved is not set yet") == 1


def test_a_poll_reads_the_same_however_many_models_others_registered(store, register, followed, monkeypatch):
    champion(store, register, followed, "ours", versions=1)
    reads, real = [], state.read
    monkeypatch.setattr(state, "read", lambda folder, kind: (reads.append(folder), real(folder, kind))[1])
    counts = []
    for count in (1, 10):
        for number in range(count):
            store.client.create_registered_model(f"foreign-{count}-{number}")
        reads.clear()
        followed.reconciler.step()
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0
    assert not list((followed.folder / "desired").glob("foreign-*"))


def test_who_registers_a_workload_is_told_that_it_has_no_champion(store, register, followed):
    register("waiting")
    followed.reconciler.step()
    assert followed.asked("waiting") == Desired("waiting", None)


def anew(store, register, name):
    store.client.delete_registered_model(name)
    register(name)
    store.move(name, "champion", 1)


@pytest.mark.parametrize("seen", [True, False], ids=["between polls", "within one"])
def test_a_model_registered_anew_under_the_same_number_is_deployed(store, register, followed, seen):
    name = f"anew-{seen}"
    champion(store, register, followed, name, versions=1)
    before = followed.asked(name)
    if seen:
        store.client.delete_registered_model(name)
        followed.reconciler.step()
        assert followed.asked(name) == before, "it goes on serving"
        register(name)
        store.move(name, "champion", 1)
    else:
        anew(store, register, name)
    followed.reconciler.step()
    after = followed.asked(name)
    assert (after.version, after.folder) == (1, before.folder)
    assert after.content != before.content
    followed.serve(name)
    assert store.get(name, 1).tags[TAG].startswith("serving since")
    followed.fail(name)
    assert followed.asked(name).content == after.content, "it is tried again, not the one that is gone"


def test_a_model_registered_anew_that_fails_leaves_the_old_one_serving(store, register, followed):
    champion(store, register, followed, "anew-bad", versions=1)
    before = followed.asked("anew-bad")
    anew(store, register, "anew-bad")
    followed.reconciler.step()
    followed.fail("anew-bad", "It does not pass its proof.")
    back = followed.asked("anew-bad")
    assert replace(back, asked=before.asked) == before
    assert "It does not pass its proof." in store.get("anew-bad", 1).tags[TAG]


@pytest.mark.parametrize("old", [False, True], ids=["of today", "of an earlier release"])
def test_a_restart_asks_for_nothing_that_serves_already(store, register, followed, old):
    name = f"restarted-{old}"
    champion(store, register, followed, name, versions=1)
    file = followed.folder / "desired" / f"{name}.json"
    if old:
        data = json.loads(file.read_bytes())
        del data["content"]
        file.write_text(json.dumps(data))
    before = file.read_bytes()
    followed.restart(store)
    for _ in range(3):
        followed.reconciler.step()
    assert file.read_bytes() == before
    anew(store, register, name)
    followed.restart(store)
    followed.reconciler.step()
    assert followed.asked(name).asked != json.loads(before)["asked"], "what changed meanwhile is found"


def test_a_deleted_model_serves_on_and_frees_its_name_where_none_of_it_served(store, register, followed, caplog):
    champion(store, register, followed, "deleted", versions=1)
    register("given-back")
    followed.reconciler.step()
    assert followed.asked("given-back") is not None
    models = followed.folder.parent / "models"
    for name in ("deleted", "given-back"):
        store.client.delete_registered_model(name)
        (models / name / "1").mkdir(parents=True)
        (models / name / "1" / "model.onnx").write_bytes(b"m")
        os.utime(models / name / "1" / "model.onnx", (1, 1))
    for _ in range(3):
        followed.reconciler.step()
    Repository(models, followed.folder).step()
    assert (followed.asked("deleted").version, followed.asked("deleted").plain) == (1, False)
    assert caplog.text.count("deleted is not registered any more; version 1 goes on serving.") == 1
    assert followed.asked("given-back").plain


def test_an_alias_that_moves_on_while_a_version_loads_is_followed_at_once(store, register, followed):
    champion(store, register, followed, "moving", versions=3)
    served = followed.asked("moving").folder
    for number in (2, 3, 1, 2):
        store.move("moving", "champion", number)
        followed.reconciler.step()
        asked = followed.asked("moving")
        assert asked.version == number
        assert number == 1 or (asked.fallback_version, asked.fallback_folder) == (1, served), "only that one serves"
    assert "moved on" in store.get("moving", 3).tags[TAG]
    followed.fail("moving", "It hangs.")
    assert followed.asked("moving").version == 1
    assert "It hangs." in store.get("moving", 2).tags[TAG]


class Meanwhile(Store):
    """Something happens while it fetches a version."""

    act = None

    def fetch(self, version, folder):
        fetched = super().fetch(version, folder)
        if self.act is not None:
            self.act()
        return fetched


def test_a_version_that_begins_to_answer_while_the_next_is_fetched_is_what_serves(
    mlflow_url, store, register, tmp_path
):
    followed = Followed(Meanwhile(mlflow_url), tmp_path)
    champion(store, register, followed, "between", versions=3)
    store.move("between", "champion", 2)
    followed.reconciler.step()
    second = followed.asked("between")
    followed.reconciler.store.act = lambda: followed.ledger.settled({"between": second})
    store.move("between", "champion", 3)
    followed.reconciler.step()
    third = followed.asked("between")
    assert (third.version, third.fallback_version, third.fallback_folder) == (3, 2, second.folder)
    followed.fail("between", "It hangs.")
    assert (followed.asked("between").version, followed.asked("between").folder) == (2, second.folder)
    assert "replaced version 1" in store.get("between", 2).tags[TAG]


def test_a_server_that_ends_asks_the_registry_for_nothing_more(mlflow_url, store, register, tmp_path):
    class Counting(Store):
        asked = 0

        def get(self, workload, number):
            Counting.asked += 1
            followed.reconciler.stop.set()
            raise RegistryError("It hangs.")

    for name in ("ending-1", "ending-2"):
        register(name)
        store.move(name, "champion", 1)
    followed = Followed(Counting(mlflow_url), tmp_path)
    followed.reconciler.step()
    assert Counting.asked == 1


def test_a_server_that_ends_starts_no_shadow(mlflow_url, store, register, tmp_path):
    register("ended")
    store.move("ended", "challenger", 1)
    fetching = Meanwhile(mlflow_url)
    side = shadowing.Shadowing(fetching, tmp_path / "bundles", tmp_path / "serving")
    fetching.act = side.stopping.set
    try:
        side.step()
        assert side.process._process is None
    finally:
        side.stop()
        store.drop("ended", "challenger")


def test_a_tag_of_a_shadow_that_is_not_taken_is_said_once_and_not_after_its_promotion(
    mlflow_url, store, register, tmp_path, caplog
):
    register("promoted")
    store.move("promoted", "challenger", 1)
    refusing = Refusing(mlflow_url)
    refusing.left = 10**6
    side = shadowing.Shadowing(refusing, tmp_path / "bundles", tmp_path / "serving")
    try:
        end = time.monotonic() + 120  # its process runs only when nothing else does
        while "of promoted version 1 is not set" not in caplog.text:
            assert time.monotonic() < end
            time.sleep(0.1)
            side.step()
        for _ in range(3):
            side.step()
        assert caplog.text.count("of promoted version 1 is not set") == 1
        store.move("promoted", "champion", 1)
        refusing.left = 0
        for _ in range(3):
            side.step()
        assert TAG not in store.get("promoted", 1).tags, "what serves is told by others"
    finally:
        side.stop()


def test_a_model_that_is_somebody_elses_is_left_alone_under_any_name(store, followed):
    name = "n" * 250
    store.client.create_registered_model(name)
    try:
        followed.reconciler.step()
    finally:
        store.client.delete_registered_model(name)


def test_a_challenger_that_the_disk_does_not_take_is_asked_for_later_and_holds_up_no_other(
    store, register, followed, monkeypatch
):
    monkeypatch.setattr(shadowing, "RETRY_SECONDS", 0.0)
    for name in ("b-blocked", "shadowed"):
        register(name)
        store.move(name, "challenger", 1)
    followed.bundles.mkdir()
    (followed.bundles / "b-blocked").write_text("no folder")
    side, asked = shadowing.Shadowing(store, followed.bundles, followed.folder), followed.folder / "shadow/asked.json"
    try:
        aside = asked.with_suffix(f".{os.getpid()}.aside")
        aside.mkdir(parents=True)
        with pytest.raises(IsADirectoryError):
            side.step()
        aside.rmdir()
        side.step()
        assert "shadowed" in shadow_state.read(asked, shadow_state.Ask)
        assert "b-blocked" not in shadow_state.read(asked, shadow_state.Ask)
        (followed.bundles / "b-blocked").unlink()
        side.step()
        assert {"b-blocked", "shadowed"} <= shadow_state.read(asked, shadow_state.Ask).keys()
    finally:
        side.stop()
