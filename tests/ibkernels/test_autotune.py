"""The search behind IBKERNELS_AUTOTUNE=1: its steps, what it keeps and reads, and that no result depends on it.

Kernels run in Triton's interpreter, with a stand-in for the timer where a test says what is fast.
"""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ibkernels

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("there is a GPU: Triton interprets nothing here", allow_module_level=True)

from ibkernels.gpu import autotune, bottleneck_linear, configs, launch
from ibkernels.gpu.configs import Config

ROOT = Path(__file__).parents[2]
SHIPPED = Config({"BM": 16, "BV": 32}, 8, 2)
RNG = torch.tensor([3, 4])
N, H, K, R, V = 21, 37, 19, 5, 45


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The search is on, knows nothing, and keeps what it finds in tmp_path / "winners"."""
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setenv("IBKERNELS_AUTOTUNE", "1")
    monkeypatch.setenv("IBKERNELS_AUTOTUNE_DIR", str(tmp_path / "winners"))


@dataclasses.dataclass
class Timer:
    """In the place of `_milliseconds`: `cost(configuration)`, which may raise; counts its calls."""

    cost: Callable[[Config], float]
    calls: int = 0

    def __call__(self, step: Any, device: torch.device) -> float:
        self.calls += 1
        step()
        return self.cost(step.args[-1])


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Config], float]], Timer]:
    def install(cost: Callable[[Config], float]) -> Timer:
        timer = Timer(cost)
        monkeypatch.setattr(autotune, "_milliseconds", timer)
        return timer

    return install


def choose(
    rows: int = 20,
    width: int = 64,
    dtype: torch.dtype = torch.float16,
    run: Any = lambda config: None,
    kernel: str = "cross_entropy_fwd",
) -> Config:
    return autotune.choose(kernel, torch.empty(rows, 4, dtype=dtype), width, run)


def winners(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "winners").iterdir())


def bowl(**best: int) -> Callable[[Config], float]:
    """Milliseconds that grow with every halving and doubling away from `best`."""

    def cost(config: Config) -> float:
        return 1 + sum(abs(math.log2(config.sizes[name] / size)) for name, size in best.items())

    return cost


# ---- the search ------------------------------------------------------------------------------------------------------


def test_a_step_halves_or_doubles_a_block_the_warps_or_both() -> None:
    steps = [candidate.sizes for candidate in autotune.neighbours(SHIPPED)]
    expected = [
        {"BM": int(16 * m), "BV": int(32 * v), "num_warps": int(8 * w), "num_stages": 2}
        for m, v, w in itertools.product((0.5, 1, 2), repeat=3)
        if (m == 1 or v == 1) and (m, v, w) != (1, 1, 1) and {m, v, w} != {0.5, 1, 2}
    ] + [{**SHIPPED.sizes, "num_stages": stages} for stages in (1, 3)]
    assert sorted(map(str, steps)) == sorted(map(str, expected))


@pytest.mark.parametrize("best", [(64, 16, 4, 1), (16, 256, 16, 5), (128, 128, 8, 3), (16, 32, 8, 2)])
def test_it_climbs_to_the_best_of_all(best: tuple[int, ...]) -> None:
    cost = bowl(**dict(zip(SHIPPED.sizes, best, strict=True)))
    found, times = autotune.climb(SHIPPED, cost)
    sizes = [2**i for i in range(4, 10)]
    all_of_them = itertools.product(sizes, sizes, (1, 2, 4, 8, 16), range(1, 6))
    least = min(all_of_them, key=lambda c: cost(Config({"BM": c[0], "BV": c[1]}, c[2], c[3])))
    assert tuple(found.sizes.values()) == best == least
    assert len(times) < 120  # of 900


def test_it_stays_within_what_kernels_take() -> None:
    """Blocks of at least 16 (the noise's columns and matrix instructions), powers of two, warps a block can have."""
    for direction in (-1, 1):
        tried: list[Config] = []

        def cost(config: Config, direction: int = direction, tried: list[Config] = tried) -> float:
            tried.append(config)
            return 1000 - direction * sum(math.log2(size) for size in config.sizes.values())

        autotune.climb(SHIPPED, lambda config: 0.9 ** (1000 - cost(config)))
        for config in tried:
            assert all(16 <= size <= 16384 and size.bit_count() == 1 for size in config.blocks.values())
            assert config.num_warps in (1, 2, 4, 8, 16) and 1 <= config.num_stages <= 5


def test_a_step_is_taken_only_for_a_gain_beyond_noise() -> None:
    faster = Config({"BM": 16, "BV": 64}, 8, 2)
    for gain, expected in ((0.99, SHIPPED), (0.97, faster)):
        found, _ = autotune.climb(SHIPPED, lambda config, gain=gain: gain if config == faster else 1.0)
        assert found == expected


def test_what_does_not_fit_is_gone_round(timer: Any, tmp_path: Path) -> None:
    from triton.runtime.errors import OutOfResources

    def cost(config: Config) -> float:
        if config.blocks["BV"] > 64:
            raise OutOfResources(300_000, 232_448, "shared memory")
        if config.num_warps == 4:
            raise RuntimeError("PassManager::run failed")
        return bowl(BM=64, BV=128)(config)

    timer(cost)
    assert choose().blocks == {"BM": 64, "BV": 64}


def test_where_the_shipped_one_does_not_fit_a_neighbour_may(timer: Any) -> None:
    def cost(config: Config) -> float:
        if config.blocks["BV"] >= 32:
            raise MemoryError
        return 1.0

    timer(cost)
    assert choose().blocks == {"BM": 16, "BV": 16}


def test_where_nothing_runs_the_shipped_one_says_why_and_nothing_is_kept(timer: Any, tmp_path: Path) -> None:
    def cost(config: Config) -> float:
        raise RuntimeError(f"no {config.num_warps} warps")

    timer(cost)
    with pytest.raises(RuntimeError, match="no 8 warps"):
        choose()
    assert winners(tmp_path) == []


def test_a_dead_device_ends_the_search_at_once(timer: Any, tmp_path: Path) -> None:
    def cost(config: Config) -> float:
        if dead.calls > 3:
            raise torch.AcceleratorError("an illegal memory access was encountered")
        return 1.0

    dead = timer(cost)
    with pytest.raises(torch.AcceleratorError):
        choose()
    assert dead.calls == 4 and winners(tmp_path) == []


def test_a_winner_by_chance_loses_the_second_measurement(timer: Any) -> None:
    seen: set[str] = set()

    def cost(config: Config) -> float:
        first = str(config.sizes) not in seen
        seen.add(str(config.sizes))
        return 0.5 if first and config.num_stages == 3 else 1.0

    timer(cost)
    assert choose() == SHIPPED


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_a_winner_is_kept_and_used_without_another_search(
    timer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    searched = timer(bowl(BM=64, BV=16))
    first = choose()
    assert first.blocks == {"BM": 64, "BV": 16}
    count, (path,) = searched.calls, winners(tmp_path)
    said = capsys.readouterr().err
    assert "cross_entropy_fwd, float16, width 64, 32 rows" in said and "_config(8, 2, BM=64, BV=16)" in said
    record = json.loads(path.read_text())
    assert record["milliseconds"] == 1 and record["shipped_milliseconds"] == 4 and record["blocks"] == first.blocks
    assert choose() == first and searched.calls == count
    autotune._known.clear()  # another process
    assert choose() == first and searched.calls == count


@pytest.mark.parametrize(
    "other",
    [{"rows": 33}, {"rows": 16}, {"width": 65}, {"width": 32}, {"dtype": torch.bfloat16}],
    ids=str,
)
def test_problems_are_told_apart(other: dict[str, Any], timer: Any, tmp_path: Path) -> None:
    searched = timer(bowl(BM=16))
    choose()
    count = searched.calls
    choose(rows=17, width=33)  # the same powers of two
    assert searched.calls == count and len(winners(tmp_path)) == 1
    choose(**other)
    assert searched.calls > count and len(winners(tmp_path)) == 2


def test_tf32_has_winners_of_its_own(timer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timer(bowl(BM=16))
    choose(dtype=torch.float32, kernel="bottleneck_linear_fwd")
    monkeypatch.setattr(autotune, "dot_precision", lambda tensor: "tf32")
    choose(dtype=torch.float32, kernel="bottleneck_linear_fwd")
    assert [path.name.split("-")[2] for path in winners(tmp_path)] == ["float32", "tf32"]


def test_another_triton_searches_again(timer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timer(bowl(BM=16))
    choose()
    monkeypatch.setattr(autotune.triton, "__version__", "99.0")
    choose()
    assert len(winners(tmp_path)) == 2


def test_nothing_is_searched_for_no_rows_or_during_a_capture(
    timer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = timer(bowl(BM=64))
    assert choose(rows=0) == SHIPPED
    monkeypatch.setattr(autotune, "_capturing", lambda device: True)
    assert choose() == SHIPPED
    assert searched.calls == 0 and not (tmp_path / "winners").exists()
    monkeypatch.setattr(autotune, "_capturing", lambda device: False)
    found = choose()
    monkeypatch.setattr(autotune, "_capturing", lambda device: True)
    assert found != SHIPPED and choose() == found  # a winner that is known is used there too


def damaged(record: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**record, **changes})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda record: json.dumps(record)[:40], "JSONDecodeError"),
        (lambda record: "[1, 2]", "its format is not"),
        (partial(damaged, format="something else"), "its format is not"),
        (partial(damaged, chip="sm_90"), "sm_90"),
        (partial(damaged, kernel="no_such_kernel"), "no_such_kernel"),
        (partial(damaged, blocks={"BM": 16}), "is no configuration of cross_entropy_fwd"),
        (partial(damaged, blocks={"BM": 24, "BV": 32}), "is no configuration of cross_entropy_fwd"),
        (partial(damaged, blocks={"BM": 8, "BV": 32}), "is no configuration of cross_entropy_fwd"),
        (partial(damaged, num_warps="8"), "is no configuration of cross_entropy_fwd"),
        (partial(damaged, milliseconds=None), "TypeError"),
        (lambda record: json.dumps({k: v for k, v in record.items() if k != "num_stages"}), "num_stages"),
    ],
)
def test_a_file_that_is_no_winner_of_the_problem_is_refused_and_left_alone(
    damage: Callable[[dict[str, Any]], str], reason: str, timer: Any, tmp_path: Path
) -> None:
    searched = timer(bowl(BM=32))
    choose()
    (path,) = winners(tmp_path)
    text = damage(json.loads(path.read_text()))
    path.write_text(text)
    autotune._known.clear()
    count = searched.calls
    with pytest.raises(ValueError, match=r"is not a winner of IBKERNELS_AUTOTUNE's search .*IBKERNELS_AUTOTUNE_DIR"):
        choose()
    with pytest.raises(ValueError, match=reason):
        choose()
    assert searched.calls == count and path.read_text() == text


def test_a_folder_that_cannot_be_written_is_named_before_the_search(
    timer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = timer(bowl(BM=32))
    (tmp_path / "file").touch()
    monkeypatch.setenv("IBKERNELS_AUTOTUNE_DIR", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot keep winners in .*file .*IBKERNELS_AUTOTUNE_DIR"):
        choose()
    assert searched.calls == 0


def test_a_winner_is_written_whole_or_not_at_all(timer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timer(bowl(BM=32))

    def full(source: str, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(autotune.os, "replace", full)
    with pytest.warns(UserWarning, match="was not kept in .*no space left"):
        assert choose().blocks["BM"] == 32  # this process uses it all the same
    assert winners(tmp_path) == []


def test_the_folder_is_a_cache_of_the_user_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("IBKERNELS_AUTOTUNE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert autotune.folder() == tmp_path / "ibkernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert autotune.folder() == tmp_path / ".cache" / "ibkernels"


_STEP = """
import os, pathlib, sys, time
import torch, ibkernels
from ibkernels.gpu import autotune
barrier = pathlib.Path(sys.argv[1])
(barrier / str(os.getpid())).touch()
while len(list(barrier.iterdir())) < int(sys.argv[2]):
    time.sleep(0.01)
hidden, weight = torch.randn(20, 24), torch.randn(12, 24)
for rank in (None, 3):
    encoder = weight if rank is None else (torch.randn(rank, 24), torch.randn(12, rank))
    ibkernels.variational_bottleneck(hidden, encoder, backend="triton")
"""


def test_processes_at_the_same_time_leave_whole_files(tmp_path: Path) -> None:
    """With the real clock: each finds what it finds, the last one's files stay, and a later process reads them."""
    (tmp_path / "ready").mkdir()
    command = [sys.executable, "-W", "ignore", "-c", _STEP, str(tmp_path / "ready"), "3"]
    started = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert sum("is the fastest" in each for each in said) > 1
    names = {path.name.split("-")[0] for path in winners(tmp_path)}
    assert names == {"bottleneck_linear_fwd", "bottleneck_lora_fwd"} and len(winners(tmp_path)) == 2
    for path in winners(tmp_path):
        autotune.read(path)
    later = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "is the fastest" not in later.stderr


# ---- off, and on in the ops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", "0"])
def test_it_is_off_unless_asked_for(value: str | None, timer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    searched = timer(bowl(BM=64))
    monkeypatch.delenv("IBKERNELS_AUTOTUNE") if value is None else monkeypatch.setenv("IBKERNELS_AUTOTUNE", value)
    ibkernels.variational_bottleneck(torch.randn(N, H), torch.randn(2 * K, H), backend="triton")
    assert searched.calls == 0 and not (tmp_path / "winners").exists()


def test_another_value_of_the_switch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBKERNELS_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="IBKERNELS_AUTOTUNE is 'yes'; it must be 1"):
        ibkernels.variational_bottleneck(torch.randn(N, H), torch.randn(2 * K, H), backend="triton")


def step(backend: str, dtype: torch.dtype, encoder: str, width: int) -> dict[str, Tensor]:
    """Outputs and gradients of both ops, through every kernel of an encoder and of a narrow or wide head."""
    generator = torch.Generator().manual_seed(0)

    def make(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).requires_grad_()

    hidden, head, labels = make(N, H), make(V, width), torch.arange(N) * 7 % V
    weight: Any = make(2 * K, H) if encoder == "linear" else (make(R, H), make(2 * K, R))
    leaves = [hidden, head, *([weight] if encoder == "linear" else weight), make(2 * K), make(N, width)]
    z, kl = ibkernels.variational_bottleneck(hidden, weight, leaves[-2], RNG, backend=backend)
    loss: Any = ibkernels.linear_cross_entropy(leaves[-1], head, labels, backend=backend)
    gradients = torch.autograd.grad([z.float().sum() + kl.sum() + loss], leaves)
    return {"z": z, "kl": kl, "loss": loss, **{str(i): gradient for i, gradient in enumerate(gradients)}}


@pytest.mark.parametrize("best", [64, 16], ids=["large-blocks", "small-blocks"])
@pytest.mark.parametrize(("encoder", "width"), [("linear", K), ("lora", 700)])
def test_results_do_not_depend_on_the_configuration(
    encoder: str, width: int, best: int, timer: Any, tmp_path: Path
) -> None:
    timer(lambda config: 1 + sum(abs(math.log2(size / best)) for size in config.blocks.values()))
    dtype = torch.float16 if width == K else torch.float32  # the narrow head's kernels are of half precision
    ours = step("triton", dtype, encoder, width)
    chosen = {path.name.split("-")[0]: autotune.read(path).config.blocks for path in winners(tmp_path)}
    head = {"cross_entropy_fwd", "cross_entropy_finish", "cross_entropy_bwd_weight"} if width == K else {"softmax_grad"}
    kernels = {name for name in configs._SHIPPED if name.startswith(f"bottleneck_{encoder}")}
    assert chosen.keys() == (kernels - {"bottleneck_linear_fwd_half"}) | head
    assert all(set(blocks.values()) == {best} for blocks in chosen.values())
    for name, exact in step("reference", torch.float64, encoder, width).items():
        scale = exact.abs().max()
        assert (ours[name].double() - exact).abs().max() <= (2e-5 if dtype == torch.float32 else 5e-3) * scale, name


def test_noise_is_that_of_any_configuration(timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """mu = 0 and logvar = 0: z is the noise itself."""
    hidden, weight = torch.zeros(N, H), torch.zeros(2 * K, H)
    drawn = []
    for best in (16, 32, 128):
        timer(lambda config, best=best: 1 + sum(abs(math.log2(size / best)) for size in config.blocks.values()))
        autotune._known.clear()
        monkeypatch.setenv("IBKERNELS_AUTOTUNE_DIR", f"{autotune.folder()}{best}")
        drawn.append(ibkernels.variational_bottleneck(hidden, weight, None, RNG, backend="triton")[0])
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_compiled_ops_search_when_they_run_and_not_when_they_are_traced(timer: Any, tmp_path: Path) -> None:
    searched = timer(bowl(BM=32))
    hidden, weight = torch.randn(N, H), torch.randn(2 * K, H)
    function = partial(ibkernels.variational_bottleneck, backend="triton")
    counts = []

    def count(graph: Any, inputs: Any) -> Any:
        counts.append(searched.calls)
        return graph.forward

    compiled = torch.compile(lambda h, w: function(h, w, None, RNG), fullgraph=True, backend=count)
    results = [compiled(hidden, weight), compiled(hidden, weight)]
    assert counts == [0] and searched.calls > 0 and len(winners(tmp_path)) == 1
    assert torch.equal(results[0][0], results[1][0])


# ---- contributing it back --------------------------------------------------------------------------------------------


def keep(folder: Path, milliseconds: float = 1.5, **fields: Any) -> None:
    """A winner of an H100, as a search would have written it."""
    config = Config(fields.pop("blocks", {"BM": 64, "BV": fields.pop("BV", 128)}), 16, 3)
    defaults = {"kernel": "cross_entropy_fwd", "chip": "sm_90", "dtype": "bfloat16", "width": 256, "rows": 16384}
    problem = autotune.Problem(**{**defaults, "triton": "3.7.1", **fields})
    folder.mkdir(exist_ok=True)
    autotune._write(folder / problem.file, problem, autotune.Winner(config, milliseconds, 2.0, "NVIDIA H100"))


def test_winners_are_printed_as_rows_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(tmp_path)
    keep(tmp_path, rows=2048, BV=32)
    keep(tmp_path, dtype="float16", BV=64)
    keep(tmp_path, chip="sm_100", BV=16)
    keep(tmp_path, kernel="bottleneck_linear_bwd", dtype="tf32", width=128, blocks={"BM": 64, "BK": 128})
    assert autotune.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert heads == ['"bottleneck_linear_bwd", 4 bytes:', '"cross_entropy_fwd", 2 bytes:']
    rows = [eval(line, vars(configs))[0] for line in lines if line.startswith("    (")]
    shipped = configs.entry("cross_entropy_fwd", 2, 256)
    assert rows[1] == (256, {**shipped, "sm_90": Config({"BM": 64, "BV": 128}, 16, 3),
                             "sm_100": Config({"BM": 64, "BV": 16}, 16, 3)})  # fmt: skip
    assert rows[0][0] == 128 and rows[0][1]["sm_90"].blocks == {"BM": 64, "BK": 128}
    notes = [line for line in lines if line.startswith("    # ")]
    assert len(notes) == 5 and all("1.5 ms, the shipped one 2 ms (NVIDIA H100, triton 3.7.1)" in note for note in notes)
    assert any("sm_90, float16, N <= 16384: _config(16, 3, BM=64, BV=64)" in note for note in notes)


def test_a_pasted_row_is_what_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path, width=64)
    row = autotune.rows_to_contribute([(autotune.problem_in(json.loads(p.read_text())), autotune.read(p))
                                       for p in tmp_path.iterdir()])[1]  # fmt: skip
    (entry,) = eval(row, vars(configs))
    table = {**configs._SHIPPED["cross_entropy_fwd"]}
    table[2] = [entry, *table[2]]
    monkeypatch.setitem(configs._SHIPPED, "cross_entropy_fwd", table)
    assert configs.lookup("cross_entropy_fwd", 2, 64, "sm_90") == Config({"BM": 64, "BV": 128}, 16, 3)
    assert configs.lookup("cross_entropy_fwd", 2, 64, "sm_80") == Config({"BM": 128, "BV": 128}, 8, 2)


def test_the_command_names_files_that_are_no_winners(tmp_path: Path) -> None:
    keep(tmp_path)
    (tmp_path / "notes.json").write_text('{"hello": 1}')
    command = [sys.executable, "-m", "ibkernels.gpu.autotune", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "BM=64, BV=128" in result.stdout
    assert "notes.json is not a winner of IBKERNELS_AUTOTUNE's search" in result.stderr
    assert "Traceback" not in result.stderr and "RuntimeWarning" not in result.stderr
    empty = subprocess.run([*command[:-1], str(tmp_path / "none")], cwd=ROOT, capture_output=True, text=True)
    assert empty.returncode == 0 and "there are no winners in" in empty.stdout


def test_every_launch_goes_through_the_seam() -> None:
    """What `configured` does not see runs neither on the tensors' device nor under a winner."""
    folder = Path(launch.__file__).parent
    launches = {
        path.name: path.read_text().count("_kernel[") for path in folder.glob("*.py") if "_kernel[" in path.read_text()
    }
    assert launches == {
        "bottleneck_linear.py": 2, "bottleneck_lora.py": 1, "bottleneck_lora_bwd.py": 3, "cross_entropy.py": 3,
        "philox.py": 1, "wide_cross_entropy.py": 1,
    }  # fmt: skip
    assert bottleneck_linear.configured is launch.configured
