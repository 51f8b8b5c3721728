"""What the server counts: exact numbers, bounded labels, sums over workers that a kill does not change."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time

import orjson
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from serving import tally
from serving.families import FAMILIES, MOST, POWERS, SECONDS
from serving.lag import look_at_log
from serving.metrics import Metrics
from serving.tally import MOST_VERSIONS, RETIRED, retire

OPENMETRICS = "application/openmetrics-text; version=1.0.0,text/plain;version=0.0.4;q=0.5"


def samples(page):
    """Sample name and labels -> value."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parse_text(page.decode())
        for sample in family.samples
    }


def read(metrics, name, **labels):
    """The sum of the samples of a name whose labels hold `labels`."""
    found = samples(metrics.page()[0])
    return sum(value for (this, *held), value in found.items() if this == name and labels.items() <= dict(held).items())


def test_a_batch_counts_each_of_its_requests():
    metrics = Metrics()
    routes, seconds = ["infer", "infer", "predict"], [0.0001, 0.003, 20.0]
    metrics.batch("taxi", 3, routes, seconds, [0.00001, 0.002, 1.0], rows=12, run=0.0004)
    found = samples(metrics.page()[0])

    def value(name, **labels):
        return found[(name, *sorted(labels.items()))]

    taxi = {"workload": "taxi"}
    assert value("noria_requests_total", route="infer", version="3", status="200", **taxi) == 2
    assert value("noria_requests_total", route="predict", version="3", status="200", **taxi) == 1
    assert value("noria_rows_total", version="3", **taxi) == 12
    bucket = "noria_request_duration_seconds_bucket"
    below = [value(bucket, route="infer", le=le, **taxi) for le in ("0.0001", "0.0025", "0.005", "+Inf")]
    assert below == [1, 1, 2, 2]
    assert [value(bucket, route="predict", le=le, **taxi) for le in ("10.0", "+Inf")] == [0, 1]
    assert value("noria_request_duration_seconds_sum", route="predict", **taxi) == 20
    assert value("noria_batch_rows_bucket", le="8.0", **taxi) == 0
    assert value("noria_batch_rows_bucket", le="16.0", **taxi) == 1
    assert value("noria_batch_requests_sum", **taxi) == 3
    assert value("noria_queue_duration_seconds_count", **taxi) == 3
    assert value("noria_model_run_duration_seconds_sum", version="3", **taxi) == 0.0004


def test_one_request_alone_counts_as_it_does_among_others():
    alone, together = Metrics(), Metrics()
    seconds = [0.0002, 0.003, 0.4]
    for taken in seconds:
        alone.batch("taxi", 3, ["infer"], [taken], [taken / 2], rows=1, run=0.001)
    together.batch("taxi", 3, ["infer"] * 3, seconds, [taken / 2 for taken in seconds], rows=3, run=0.001)
    for name in ("noria_request_duration_seconds", "noria_queue_duration_seconds", "noria_requests_total"):
        found, expected = (metrics.numbers()[name] for metrics in (alone, together))
        assert {key: pytest.approx(values) for key, values in expected.items()} == found
    assert read(alone, "noria_request_duration_seconds_sum") == pytest.approx(0.4032)
    assert read(alone, "noria_rows_total") == read(together, "noria_rows_total") == 3


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 64, 65, MOST - 1, MOST, MOST + 1])
def test_a_number_of_rows_is_in_the_bucket_that_its_bound_says(rows):
    metrics = Metrics()
    metrics.batch("taxi", 3, ["infer"], [0.001], rows=rows, run=0.001)
    found = samples(metrics.page()[0])
    for bound in POWERS:
        below = found[("noria_batch_rows_bucket", ("le", str(bound)), ("workload", "taxi"))]
        assert below == (rows <= bound), bound
    assert found[("noria_batch_rows_count", ("workload", "taxi"))] == 1


@pytest.mark.parametrize("bound", SECONDS)
def test_a_latency_on_a_bound_is_below_it(bound):
    metrics = Metrics()
    metrics.answered("infer", "taxi", 1, 200, bound)
    metrics.answered("infer", "taxi", 1, 200, bound * 1.001)
    found = samples(metrics.page()[0])
    labels = (("le", str(bound)), ("route", "infer"), ("workload", "taxi"))
    assert found[("noria_request_duration_seconds_bucket", *labels)] == 1


def test_what_clients_send_does_not_grow_the_page():
    metrics = Metrics()
    metrics.loaded("taxi", 3, "CPUExecutionProvider")
    metrics.answered("infer", "taxi", 3, 200, 0.001, 1)
    for number in range(10):  # the shared labels themselves
        metrics.answered("r" * number, "w" * number, 0, 404, 0.001)
        metrics.refused("w" * number, "x" * number)
    before = len(metrics.page()[0].splitlines())
    source = random.Random(0)
    for _ in range(10_000):
        name = source.randbytes(8).hex()
        metrics.answered(name, name, 0, 404, 0.001)
        metrics.answered("feedback", name, 0, 404, 0.001, 5)
        metrics.refused(name, name)
    metrics.answered("feedback", "taxi", 0, 404, 0.001)
    after = metrics.page()[0].decode()
    added = len(after.splitlines()) - before
    # route="feedback" with an unknown and with a known workload: two histograms and counters, and the labels taken
    assert added == 2 * (len(SECONDS) + 3 + 1) + 1
    assert read(metrics, "noria_requests_total", route="other", workload="") == 10_010
    assert read(metrics, "noria_refusals_total", reason="other", workload="") == 10_010


def test_several_threads_lose_no_count():
    metrics = Metrics()

    def work():
        for _ in range(20_000):
            metrics.answered("infer", "taxi", 1, 200, 0.001, 1)
            metrics.batch("taxi", 1, ["infer", "predict"], [0.001, 0.002], rows=2, run=0.001)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            metrics.numbers()
            time.sleep(0.01)
    finally:
        sys.setswitchinterval(interval)
    assert read(metrics, "noria_requests_total") == 4 * 20_000 * 3
    assert read(metrics, "noria_rows_total") == 4 * 20_000 * 3


def filled(folder, source, requests):
    metrics = Metrics(folder, source)
    metrics.loaded("taxi", 3, "CPUExecutionProvider")
    for _ in range(requests):
        metrics.batch("taxi", 3, ["infer"], [0.003], [0.001], rows=2, run=0.001)
    metrics.queued("taxi", requests)
    metrics.log_lag("taxi", requests, 1, time.time() - requests)
    metrics.connected(requests)
    return metrics


def test_any_worker_answers_for_all(tmp_path):
    one, two, ended = (filled(tmp_path, source, count) for source, count in (("a", 5), ("b", 7), ("c", 11)))
    two.dump()
    ended.dump(ended=True)
    for asked in (one, two):
        assert read(asked, "noria_requests_total") == 23
        assert read(asked, "noria_batch_rows_sum") == 46
        assert read(asked, "noria_request_duration_seconds_bucket", le="0.005") == 23
        assert read(asked, "noria_queue_requests") == 12  # of those that live
        assert read(asked, "noria_log_pending_rows") == 12
        assert read(asked, "noria_log_lag_seconds") == pytest.approx(7, abs=1)  # the oldest, not the sum
        assert read(asked, "noria_model_info", version="3", provider="cpu") == 1
        assert read(asked, "noria_connections", worker="a") == 5
        workers = {
            dict(labels)["worker"]
            for name, *labels in samples(asked.page()[0])
            if name == "process_resident_memory_bytes"
        }
        assert workers == {"a", "b"}


def test_a_worker_that_was_killed_keeps_its_counters_and_loses_its_gauges(tmp_path, monkeypatch):
    one = filled(tmp_path, "a", 5)
    filled(tmp_path, "b", 7).dump()
    monkeypatch.setattr(tally, "STALE_SECONDS", 0.0)
    assert read(one, "noria_requests_total") == 12
    assert read(one, "noria_queue_requests") == 5


def test_a_model_that_went_lags_no_more(tmp_path):
    metrics = Metrics(tmp_path, "parent")
    waits = {"old": (57, 1, time.time() - 200)}
    look_at_log(metrics, waits, ["old", "other"])
    look_at_log(metrics, waits, ["other"])
    assert read(metrics, "noria_log_pending_rows") == 57, "it is unloaded, and its last rows wait"
    look_at_log(metrics, {}, ["other"])
    for name in ("noria_log_pending_rows", "noria_log_pending_segments", "noria_log_lag_seconds"):
        assert metrics.numbers()[name] == {("other",): [0.0]}


def test_ended_workers_are_folded_once(tmp_path):
    one = filled(tmp_path, "a", 5)
    one.dump()
    for source, count in (("b", 7), ("c", 11)):
        filled(tmp_path, source, count).dump(ended=True)
    for _ in range(3):
        retire(tmp_path, {"a"})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "retired.json"]
        assert read(one, "noria_requests_total") == 23
        assert read(one, "noria_queue_requests") == 5
    filled(tmp_path, "d", 2).dump(ended=True)
    retire(tmp_path, {"a"})
    assert read(one, "noria_requests_total") == 25


KILLED = """
import os, signal, sys
from pathlib import Path
from serving.tally import retire
left = [int(sys.argv[2])]

def hook(event, given):
    # Every change that retiring makes in the folder is one of these; die just before the n-th.
    if event in ("os.rename", "os.remove") or (event == "open" and isinstance(given[1], str) and "w" in given[1]):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
retire(Path(sys.argv[1]), {"a"})
"""


def test_folding_that_is_killed_counts_nothing_twice_and_loses_nothing(tmp_path):
    """Killed before each of its writes, renames and removals; whoever asks meanwhile, and afterwards, is told 23."""
    kills = 0
    for step in range(20):
        folder = tmp_path / str(step)
        one = filled(folder, "a", 5)
        for source, count in (("b", 7), ("c", 11)):
            filled(folder, source, count).dump(ended=True)
        (folder / "z.aside").write_bytes(b"half a fi")
        ended = subprocess.run([sys.executable, "-B", "-c", KILLED, str(folder), str(step)], timeout=60, check=False)
        assert read(one, "noria_requests_total") == 23, step
        retire(folder, {"a"})
        assert read(one, "noria_requests_total") == 23, step
        assert sorted(path.name for path in folder.iterdir()) == ["a.json", "retired.json"], step
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL
        kills += 1
    assert kills == 5  # one write, one rename, two removals of files, one of what a kill left aside


def test_a_number_that_was_shown_outlives_its_worker(tmp_path):
    """To Prometheus a counter that goes down is one that began again, so that all of it would count once more."""
    told = subprocess.run(
        [
            sys.executable, "-c",
            "import os, sys; from pathlib import Path; from serving.metrics import Metrics\n"
            "metrics = Metrics(Path(sys.argv[1]), 'gone')\n"
            "metrics.dump()\n"
            "metrics.batch('taxi', 3, ['infer'] * 9, [0.001] * 9, rows=9, run=0.001)\n"
            "sys.stdout.buffer.write(metrics.page()[0]); sys.stdout.flush(); os.kill(os.getpid(), 9)",
            str(tmp_path),
        ],
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert told.returncode == -signal.SIGKILL
    counters = {name: value for name, value in samples(told.stdout).items() if name[0].startswith("noria_")}
    assert read(Metrics(tmp_path, "other"), "noria_requests_total") == 9
    retire(tmp_path, set())
    later = samples(Metrics(tmp_path, "third").page()[0])
    lasting = {name for name in counters if name[0].endswith(("_total", "_bucket", "_count", "_sum"))}
    assert len(lasting) > 50
    assert {name: later[name] for name in lasting} == {name: counters[name] for name in lasting}


def test_files_that_are_none_are_passed_over(tmp_path):
    one = filled(tmp_path, "a", 5)
    filled(tmp_path, "b", 7).dump()
    other = orjson.loads((tmp_path / "b.json").read_bytes())
    other["source"] = "c"
    # An earlier release, whose buckets were others.
    other["numbers"]["noria_request_duration_seconds"] = [[["infer", "taxi"], [1, 2, 3.0]]]
    other["numbers"]["noria_of_old"] = [[[], [1]]]
    (tmp_path / "c.json").write_bytes(orjson.dumps(other))
    for name, content in (("d", b""), ("e", b"[1]"), ("f", b'{"source": "f"}'), (RETIRED, b"{")):
        (tmp_path / f"{name}.json").write_bytes(content)
    assert read(one, "noria_requests_total") == 19
    assert read(one, "noria_request_duration_seconds_count") == 12
    retire(tmp_path, {"a"})
    assert read(one, "noria_requests_total") == 19


def test_years_of_versions_stay_one_page(tmp_path):
    for version in range(1, MOST_VERSIONS + 11):
        metrics = Metrics(tmp_path, f"w{version}")
        metrics.answered("infer", "taxi", version, 200, 0.001, 1)
        metrics.answered("infer", "taxi", 0, 404, 0.001)
        metrics.dump(ended=True)
        retire(tmp_path, set())
    asked = Metrics(tmp_path, "now")
    kept = samples(asked.page()[0])
    versions = {int(dict(labels)["version"] or 0) for name, *labels in kept if name == "noria_requests_total"}
    assert versions == {0, *range(11, MOST_VERSIONS + 11)}
    assert read(asked, "noria_request_duration_seconds_count") == 2 * (MOST_VERSIONS + 10)


def test_a_disk_that_cannot_be_written_does_not_stop_the_page(tmp_path, caplog):
    (tmp_path / "metrics").write_text("a file where the folder should be")
    metrics = filled(tmp_path / "metrics", "a", 5)
    for _ in range(3):
        assert read(metrics, "noria_requests_total") == 5
    assert caplog.text.count("cannot be written") == 1


def test_versions_come_and_go():
    metrics = Metrics()
    metrics.loaded("taxi", 3, "CPUExecutionProvider")
    metrics.loaded("taxi", 4, "CUDAExecutionProvider")
    metrics.unloaded("taxi", 3)
    assert read(metrics, "noria_model_info") == read(metrics, "noria_model_info", version="4", provider="cuda") == 1
    metrics.swapped("taxi", "serving", 2.0)
    metrics.swapped("taxi", "failed")
    assert read(metrics, "noria_swaps_total", status="serving") == read(metrics, "noria_swaps_total", status="failed")
    assert read(metrics, "noria_swap_duration_seconds_sum", workload="taxi") == 2
    metrics.shadowed("taxi", 5, scored=3, dropped=1)
    assert read(metrics, "noria_shadow_rows_total", version="5", result="dropped") == 1
    metrics.log_lost(4)
    metrics.log_synced(0.01)
    assert read(metrics, "noria_log_lost_rows_total") == 4
    assert read(metrics, "noria_log_sync_duration_seconds_sum") == 0.01


def test_the_process_tells_of_itself():
    metrics = Metrics(None, "me")
    assert 10e6 < read(metrics, "process_resident_memory_bytes", worker="me") < 10e9
    assert 0 < read(metrics, "process_open_fds", worker="me") <= read(metrics, "process_max_fds", worker="me")
    assert abs(read(metrics, "process_start_time_seconds", worker="me") - time.time()) < 86_400
    assert read(metrics, "process_cpu_seconds_total", worker="me") == pytest.approx(sum(os.times()[:2]), abs=2)


def test_both_formats_say_the_same(tmp_path):
    metrics = filled(tmp_path, "a", 5)
    text, text_type = metrics.page()
    wide, wide_type = metrics.page(OPENMETRICS)
    assert text_type.startswith("text/plain; version=")
    assert wide_type.startswith("application/openmetrics-text; version=1.0.0")
    assert wide.endswith(b"# EOF\n")
    families = list(parse_openmetrics(wide.decode()))  # strict: raises on what the format forbids
    assert {family.name: family.unit for family in families}["noria_request_duration_seconds"] == "seconds"
    strict = {(sample.name, *sorted(sample.labels.items())) for family in families for sample in family.samples}
    assert strict == set(samples(text))


@pytest.mark.parametrize("version", ["abc", "1.x", "", "-1", "1.0.0;escaping=x"])
def test_an_accept_header_that_makes_no_sense_gets_a_page(version):
    for kind in ("application/openmetrics-text", "text/plain"):
        text, found = Metrics().page(f"{kind}; version={version}")
        assert b"noria_build_info" in text and "version=" in found


def test_names_follow_the_rules():
    for family in FAMILIES:
        assert family.name.startswith(("noria_", "process_")), family.name
        assert family.name.endswith("_total") == (family.kind == "counter"), family.name
        assert family.name.endswith("_info") == (family.kind == "info"), family.name
        assert not {"le", "job", "instance", "name"} & set(family.labels), family.name
        assert family.text.endswith("."), family.name
        assert list(family.bounds) == sorted(set(family.bounds)), family.name
