"""The benchmark: its statistics, its reading of fio, its accounts, one short run. No timing is judged."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from scripts import bench
from scripts.benchmark import document, growth, images, plots, profiles, servers, stats, works
from scripts.benchmark.clients import ClientFailed, FioResult
from scripts.benchmark.report import Result, number, table
from scripts.benchmark.stats import Better, Sample, Summary
from tests.support import marks


def samples(*values: float) -> list[Sample]:
    return [Sample(value) for value in values]


class TestStatistics:
    def test_summary(self) -> None:
        found = Summary.of([Sample(10, 2.0, 4, 100), Sample(30, 3.0, 3, 300), Sample(20, 1.0, 4, 200)])
        assert found == Summary(median=20, spread=0.5, cpu_per_op=0.5, peak=300)

    def test_summary_of_zeroes_has_no_spread(self) -> None:
        assert Summary.of(samples(0, 0)).spread == 0

    def test_summary_of_nothing(self) -> None:
        with pytest.raises(ValueError):
            Summary.of([])

    def test_no_operations_cost_nothing(self) -> None:
        assert Sample(1, cpu=1.0, ops=0).cpu_per_op == 0

    @pytest.mark.parametrize(("better", "expected"), [(Better.HIGHER, 2.0), (Better.LOWER, 0.5)])
    def test_ratio_is_above_one_if_ours_is_better(self, better: Better, expected: float) -> None:
        assert stats.ratio(samples(20, 40, 90), samples(10, 20, 30), better) == expected

    def test_ratio_pairs_rounds(self) -> None:
        # The machine was slow in the second round, for both: the ratio of the medians would be 1.
        assert stats.ratio(samples(200, 20, 20), samples(100, 10, 20), Better.HIGHER) == 2.0

    @pytest.mark.parametrize(("ours", "theirs"), [((1,), (0,)), ((0,), (1,)), ((), (1,)), ((1,), ())])
    def test_ratio_that_cannot_be_said(self, ours: tuple[float, ...], theirs: tuple[float, ...]) -> None:
        assert stats.ratio(samples(*ours), samples(*theirs), Better.HIGHER) is None

    def test_verdict_is_about_the_hardest_peer(self) -> None:
        peers = {"slow": samples(5), "fast": samples(20), "failed": samples(0), "absent": []}
        assert stats.verdict(samples(10), peers, Better.HIGHER) == stats.Verdict("fast", 0.5)
        assert stats.verdict(samples(10), peers, Better.LOWER) == stats.Verdict("slow", 0.5)
        assert stats.verdict(samples(10), {}, Better.LOWER) is None


def side(ios: int = 0, iops: float = 0.0, bandwidth: int = 0, p99: int = 0) -> dict[str, object]:
    latency = {"clat_ns": {"percentile": {"99.000000": p99}}} if ios else {"clat_ns": {}}
    return {"total_ios": ios, "iops": iops, "bw_bytes": bandwidth, **latency}


def fio_output(*jobs: dict[str, object]) -> str:
    idle = {"jobname": "bench", "error": 0, "read": side(), "write": side(), "trim": side()}
    whole = [idle | job for job in jobs]
    return "fio: a warning\n" + json.dumps({"jobs": whole})


class TestFio:
    def test_reads_and_writes_add_up(self) -> None:
        output = fio_output({"read": side(70, 7.0, 700, 2_000), "write": side(30, 3.0, 300, 5_000)})
        assert FioResult.parse(output) == FioResult(iops=10.0, bandwidth=1000, ops=100, p99=5e-6)

    @pytest.mark.parametrize(
        ("output", "text"),
        [
            ("fio: engine nbd not loadable", "not loadable"),
            (fio_output({"error": 5, "read": side(1, 1.0, 1, 1)}), "error 5"),
            (fio_output({}), "nothing"),
        ],
    )
    def test_failure(self, output: str, text: str) -> None:
        with pytest.raises(ClientFailed, match=text):
            FioResult.parse(output)


class TestProfiles:
    def test_calls_by_name(self) -> None:
        rule = "-------- ---------\n"
        report = f"syscall      calls\n{rule}preadv2       1200\nsendto           7\n{rule}total       1207\n"
        assert profiles.parse(report) == {"preadv2": 1200, "sendto": 7}

    def test_calls_per_operation_without_the_rare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(profiles.shutil, "which", lambda _: "/usr/bin/strace")
        calls = {"call:brk": 1, "call:sendto": 50, "call:preadv2": 100}

        def measure(bench: works.Bench, _contender: servers.Contender) -> Sample:
            extra = {"user": 0.2, "system": 0.1} | (calls if bench.count_calls else {})
            return Sample(1, ops=100, extra=extra)

        quiet = works.Bench(images.Images(Path()), 1.0)
        found = profiles.profile(
            quiet, replace(quiet, count_calls=True), a_work(measure=measure), servers.nbdbm()
        )
        assert found == profiles.Profile("w", "nbdbm", 0.002, 0.001, {"preadv2": 1.0, "sendto": 0.5})
        assert list(found.calls) == ["preadv2", "sendto"]
        assert "2000.00 us user" in str(found)

    def test_a_work_without_a_load(self) -> None:
        bench = works.Bench(images.Images(Path()), 1.0)
        with pytest.raises(ClientFailed, match="no load"):
            profiles.profile(bench, bench, a_work(measure=lambda *_: Sample(1)), servers.nbdbm())


def test_an_evicted_file_is_on_the_disk_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(images.MIB))
    # What the file system then does is its own affair (in memory, nothing): the judgement is ours.
    for stays, refused in ((b"0\n", False), (b"8192\n", False), (b"20480\n", True)):
        done = subprocess.CompletedProcess([], 0, stays)
        monkeypatch.setattr(images.subprocess, "run", lambda *_, done=done, **__: done)
        if refused:
            with pytest.raises(images.NotEvicted, match="of file"):
                images.evict(path)
        else:
            images.evict(path)


def a_work(**changes: object) -> works.Work:
    given = {"name": "w", "title": "t", "unit": "IOPS", "better": Better.HIGHER, "measure": None, "goal": 1.5}
    return works.Work(**(given | changes))  # type: ignore[arg-type]


class TestReport:
    def result(self, **changes: object) -> Result:
        result = Result(a_work(**changes), ["nbdbm", "qemu-nbd", "nbdkit", "old"], frozenset(["nbdkit"]))
        result.others = frozenset(["old"])
        for name, value in (("nbdbm", 30), ("qemu-nbd", 20), ("nbdkit", 90), ("old", 50)):
            result.add(name, Sample(value, 1.0, 1000, images.MIB))
        return result

    def test_only_peers_are_to_be_beaten(self) -> None:
        assert self.result().verdict() == stats.Verdict("qemu-nbd", 1.5)

    @pytest.mark.parametrize(
        ("changes", "met"),
        [
            ({"goal": 1.5}, True),
            ({"goal": 1.51}, False),
            ({"goal": None}, None),
            ({"goal": None, "bound": 30.0}, True),
            ({"goal": None, "bound": 29.0}, False),
        ],
    )
    def test_goal(self, changes: dict[str, object], met: bool | None) -> None:
        assert self.result(**changes).met() is met

    def test_skipped(self) -> None:
        result = Result(a_work(), ["nbdbm", "qemu-nbd"], skipped={"nbdbm": "cannot write"})
        assert result.verdict() is None and result.met() is None
        assert result.as_dict()["skipped"] == {"nbdbm": "cannot write"}

    def test_json_holds_every_sample(self) -> None:
        document = json.loads(json.dumps(self.result().as_dict()))
        assert (document["ratio"], document["best_peer"], document["met"]) == (1.5, "qemu-nbd", True)
        assert document["contenders"]["qemu-nbd"]["samples"][0]["value"] == 20
        assert document["contenders"]["old"]["ratio"] == 0.6

    def test_table(self) -> None:
        result = self.result()
        console = Console(file=io.StringIO(), width=200)
        console.print(table([result], result.order))
        assert isinstance(console.file, io.StringIO)
        text = console.file.getvalue()
        for expected in ("30 ±0%", "1.50x", "1k", "qemu-nbd"):
            assert expected in text

    @pytest.mark.parametrize(
        ("value", "text"),
        [(174_000, "174k"), (3_324, "3.32k"), (2.5e6, "2.5M"), (641, "641"), (0.0123, "0.0123")],
    )
    def test_number(self, value: float, text: str) -> None:
        assert number(value) == text


class TestCommandLine:
    def test_every_work_has_an_image_and_a_goal(self) -> None:
        for work in works.WORKS:
            assert work.image is None or work.image in images.MAKERS
            assert (work.goal is None) != (work.bound is None), work.name
        assert images.SPACE.keys() == images.MAKERS.keys()

    def test_list(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert bench.main(["--list"]) == 0
        names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
        assert names == [work.name for work in works.WORKS]

    @pytest.mark.parametrize("wrong", [["no-such-work"], ["--rounds", "0"], ["--also", "nothing"]])
    def test_usage(self, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            bench.main(wrong)
        assert caught.value.code == 2
        assert wrong[-1] in capsys.readouterr().err

    def test_too_little_space(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = bench.Plan(works.WORKS, [], 1, 1.0, 1)
        usage = type(bench.shutil.disk_usage(tmp_path))
        monkeypatch.setattr(bench.shutil, "disk_usage", lambda _: usage(2**50, 0, 2**50))
        assert bench.shortage(plan, tmp_path) is None
        monkeypatch.setattr(bench.shutil, "disk_usage", lambda _: usage(2**50, 2**50, 0))
        assert "--scale" in (bench.shortage(plan, tmp_path) or "")


class TestPlots:
    @pytest.mark.parametrize(
        ("values", "ends"),
        [
            ([1.5, 300], (1, 500)),
            ([1, 1000], (1, 1000)),
            ([0.16], (0.05, 0.5)),  # a decade at least, whatever the values are
            ([50_000, 51_000], (20_000, 200_000)),
        ],
    )
    def test_scale(self, values: list[float], ends: tuple[float, float]) -> None:
        assert plots.scale(values) == pytest.approx(ends)

    def test_drawing(self) -> None:
        panel = plots.Panel("a < b & c", "s", {"nbdbm": [1, None, 0], "<peer>": [2, 20, 200]})
        root = ElementTree.fromstring(plots.draw([panel, panel], ["1", "2", "4"], "R&D"))
        names = {"svg": "http://www.w3.org/2000/svg"}
        texts = [node.text for node in root.iterfind(".//svg:text", names)]
        for expected in ("a < b & c", "<peer>", "R&D", "100"):
            assert expected in texts
        lines = [node.get("points", "").split() for node in root.iterfind("svg:g//svg:polyline", names)]
        assert [len(line) for line in lines] == [2, 3, 2, 3]
        # More is higher up, and nothing leaves the panel, not even a zero.
        heights = [[float(point.split(",")[1]) for point in line] for line in lines]
        assert heights[1] == sorted(heights[1], reverse=True)
        for height in (height for line in heights for height in line):
            assert plots.TOP <= height <= plots.HEIGHT - plots.BOTTOM

    def test_labels_that_would_touch_are_left_out(self) -> None:
        marks = [f"{number} terabytes" for number in range(8)]
        drawn = plots.draw([plots.Panel("t", "s", {"a": [1.0] * 8})], marks, "x")
        assert "7 terabytes" in drawn and "6 terabytes" not in drawn


class TestGrowth:
    def test_medians_by_panel_with_gaps_where_a_contender_failed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rounds = iter([1.0, 5.0, 3.0, 7.0, 7.0, 7.0])

        def measure(_place: Path, contender: servers.Contender, value: int) -> list[float]:
            if (contender.name, value) == ("peer", 2):
                raise servers.CannotServe("too many")
            return [next(rounds), 0.5] if contender.ours else [10.0 * value, 0.5]

        grown = growth.Growth("g", "things", [1, 2], str, [("a", "s"), ("b", "s")], measure, rounds=3)
        contenders = [
            servers.Contender(name, lambda *_: [], ours=name == "nbdbm") for name in ("nbdbm", "peer")
        ]
        found = json.loads(json.dumps(growth.grow(grown, contenders, tmp_path)))
        assert found["marks"] == ["1", "2"]
        assert [panel["title"] for panel in found["panels"]] == ["a", "b"]
        assert found["panels"][0]["series"] == {"nbdbm": [3.0, 7.0], "peer": [10.0, None]}
        said = capsys.readouterr()
        assert "peer: too many" in said.err and "peer - -" in said.out

    def test_labels(self) -> None:
        shown = {
            one.name: [one.label(value) for value in (one.values[0], one.values[-1])]
            for one in growth.GROWTHS
        }
        assert shown == {
            "disk": ["1 GiB", "16 TiB"],
            "bitmaps": ["0", "64"],
            "extents": ["1k", "1M"],
            "connections": ["1", "256"],
        }


class TestDocument:
    def results(self) -> dict[str, object]:
        result = Result(a_work(), ["nbdbm", "qemu-nbd", "nbdkit"], frozenset(["nbdkit"]))
        for name, value in (("nbdbm", 30), ("qemu-nbd", 20), ("nbdkit", 60)):
            result.add(name, Sample(value, 1.0, 1000, images.MIB))
        absent = Result(a_work(name="gone", title="a|b"), result.order, skipped={"nbdbm": "cannot write"})
        plan = bench.Plan([], [], rounds=2, seconds=1.0, scale=4)
        panel = {"title": "start", "unit": "s", "series": {"nbdbm": [0.1, None], "qemu-nbd": [1.0, 2000.0]}}
        figure = {"name": "disk", "axis": "size", "marks": ["1 GiB", "4 GiB"], "panels": [panel]}
        profile = profiles.Profile("w", "nbdbm", 2e-6, 3e-6, {"preadv2": 1.0})
        return {
            "bench": bench._document(plan, [result, absent], 0.0),
            "growth": {"figures": [figure]},
            "profile": {"profiles": [profile.as_dict()]},
        }

    def block(self, name: str) -> str:
        text = f"before\n<!-- figures: {name} -->\nold\n<!-- end -->\nafter\n"
        made = document.renewed(text, self.results())
        assert made.startswith("before\n<!-- figures") and made.endswith("<!-- end -->\nafter\n")
        assert "old" not in made
        # What was made is found again the next time.
        assert document.renewed(made, self.results()) == made
        return made

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("shape", ["1970-01-01", "2 rounds of 1 s, 1/4 of the data", "beside qemu-nbd, nbdkit"]),
            (
                "table",
                ["| 30 ±0% | 20 ±0%, qemu-nbd | 1.50 | 1.5 | yes | 1k (1k) | 1 (1) |", "a\\|b", "skipped"],
            ),
            ("peers", ["| work | qemu-nbd |\n", "| `w` | 1.50 |"]),
            ("limit", ["| `w` | IOPS | 30 | 60 | 50% | 1k (1k) |"]),
            ("profile", ["| `w` | nbdbm | 2 | 3 | preadv2 1.00 |"]),
            (
                "growth",
                [
                    "![cost by size](performance/disk.svg)\n",
                    "- start, s: nbdbm 0.1 (1 GiB) to 0.1 (1 GiB), qemu-nbd 1 (1 GiB) to 2k (4 GiB)\n",
                ],
            ),
        ],
    )
    def test_figures(self, name: str, expected: list[str]) -> None:
        made = self.block(name)
        for text in expected:
            assert text in made

    def test_a_figure_that_nobody_makes(self) -> None:
        with pytest.raises(KeyError, match="nonsense"):
            self.block("nonsense")

    def test_what_is_committed_belongs_together(self) -> None:
        text = document.DOCUMENT.read_text()
        assert {block[2] for block in document.BLOCK.finditer(text)} == document.BLOCKS.keys()
        for name in re.findall(r"\]\((performance/[^)]+)\)", text):
            assert (document.DOCUMENT.parent / name).is_file(), name
        found = {
            path.stem: json.loads(path.read_text())
            for path in document.DOCUMENT.with_suffix("").glob("*.json")
        }
        assert document.renewed(text, found) == text, "make bench-doc renews it"
        for name, drawing in document.drawings(found).items():
            assert (document.DOCUMENT.with_suffix("") / name).read_text() == drawing, (
                "make bench-doc renews it"
            )


def test_a_server_that_refuses_is_skipped_by_name(tmp_path: Path) -> None:
    def measure(_bench: works.Bench, contender: servers.Contender) -> Sample:
        with servers.serve(contender, servers.Serving(tmp_path / "absent.qcow2")):
            raise AssertionError("it cannot have started")

    refusing = servers.Contender("nbdbm", lambda *_: [sys.executable, "-c", "print('not me')"], ours=True)
    peer = servers.Contender("peer", lambda *_: pytest.fail("the peer is not to be run then"))
    plan = bench.Plan([a_work(measure=measure)], [refusing, peer], rounds=2, seconds=0.1, scale=1)
    (result,) = bench.run(plan, tmp_path, keep=False)
    assert result.skipped == {"nbdbm": "not me"}
    assert not result.samples


def test_accounts_of_a_process_and_its_children(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(
        "import os, socket, sys, time\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()\n"
        "reader, writer = os.pipe()\n"
        "if not os.fork():\n"
        "    os.close(writer); held = b'x' * 50_000_000; begin = time.process_time()\n"
        "    while time.process_time() - begin < 0.1: pass\n"
        "    os.read(reader, 1); os._exit(0)\n"
        "while True:\n"
        "    c, _ = s.accept(); c.sendall(bytes(18)); c.close()\n"
    )
    contender = servers.Contender("x", lambda _, path: [sys.executable, str(script), path])
    with servers.serve(contender, servers.Serving(tmp_path)) as running:
        assert running.start_time > 0
        # What the child uses, the parent does not: without the child this would never end.
        while running.cpu().total < 0.1 or running.rss() < 50_000_000:
            os.sched_yield()
        assert running.rss() <= running.peak()
    assert not Path(running.socket).exists()


@marks.requires("qemu-img", "qemu-io", "qemu-nbd", "fio", "nbdcopy")
def test_two_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "found.json"
    words = [
        "randread",
        "slow-clients",
        "--rounds",
        "1",
        "--seconds",
        "0.2",
        "--scale",
        "64",
        "--json",
        str(found),
    ]
    words += ["--dir", str(tmp_path), "--peers", "nobody", "--also", f"twin={sys.executable} -m nbdbm"]
    assert bench.main(words) == 0
    measured = json.loads(found.read_text())["works"]
    assert [work["name"] for work in measured] == ["randread", "slow-clients"]
    for work in measured:
        assert set(work["contenders"]) == {"nbdbm", "twin"}
        assert work["contenders"]["nbdbm"]["median"] > 0
        assert not work["skipped"]
    assert "randread" in capsys.readouterr().out
