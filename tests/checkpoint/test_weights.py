"""Reading tensor by tensor: what is mapped, what is copied, and how much memory it takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_config, small_llama, small_tokenizer

from minillama import load, save
from minillama.checkpoint import CheckpointError, convert, weights
from minillama.checkpoint.weights import (
    Checkpoint,
    Stored,
    checkpoint_of,
    computed,
    config_of,
    converted,
    in_file,
    llama_from,
    main_dtype,
    map_file,
    raw_bytes,
    release_pages,
)

PAGE = 4096


@pytest.fixture
def numbers(tmp_path) -> Path:
    """A file of 100,000 float32: 0, 1, 2, ..."""
    (tmp_path / "numbers").write_bytes(raw_bytes(torch.arange(100_000.0)))
    return tmp_path / "numbers"


def test_a_tensor_lies_where_it_is_said_to(numbers):
    stored = in_file(map_file(numbers), 4 * 10, torch.float32, (2, 3))
    assert stored.read().tolist() == [[10, 11, 12], [13, 14, 15]]


@given(start=st.integers(0, 4000), n=st.integers(0, 3000), odd=st.integers(0, 3))
@settings(deadline=None, max_examples=50)
def test_it_may_lie_anywhere(tmp_path_factory, start, n, odd):
    path = tmp_path_factory.getbasetemp() / "odd"
    values = torch.arange(8000.0)
    path.write_bytes(bytes(odd) + raw_bytes(values))
    stored = in_file(map_file(path), odd + 4 * start, torch.float32, (n,))
    assert torch.equal(stored.read(), values[start : start + n])
    stored.release()
    assert torch.equal(stored.read(), values[start : start + n])


def test_an_empty_file_is_mapped_to_nothing(tmp_path):
    (tmp_path / "empty").touch()
    assert map_file(tmp_path / "empty").shape == (0,)


def test_writing_to_a_view_leaves_the_file_alone(numbers):
    before = numbers.read_bytes()
    in_file(map_file(numbers), 0, torch.float32, (100_000,)).read().fill_(7)
    assert numbers.read_bytes() == before


def test_releasing_a_tensor_keeps_what_was_written_to_its_neighbours(numbers):
    """The pages at both ends are shared with other tensors, and stay."""
    file = map_file(numbers)
    parts = [in_file(file, 4 * start, torch.float32, (3000,)) for start in (0, 3000, 6000)]
    before, released, behind = (part.read() for part in parts)
    for view in (before, released, behind):
        view += 0.5
    parts[1].release()
    assert torch.equal(before, torch.arange(3000) + 0.5)
    assert torch.equal(behind, torch.arange(6000, 9000) + 0.5)
    changed = released != torch.arange(3000.0, 6000.0)
    if sys.platform == "linux":  # elsewhere the system may keep the pages
        assert 0 < (~changed).sum() >= 3000 - 2 * PAGE // 4  # whole pages are as in the file


def test_less_than_a_page_is_never_released():
    """Of other memory, a released page would come back as zeros."""
    for n in (0, 1, 100, PAGE // 4):
        tensor = torch.ones(n)
        release_pages(tensor)
        assert tensor.eq(1).all()


def test_what_is_computed_is_computed_when_it_is_read():
    calls = []

    def read() -> torch.Tensor:
        calls.append("read")
        return torch.arange(6.0)

    source = Stored((6,), torch.float32, read, lambda: calls.append("release"))
    stored = computed([source], lambda tensor: tensor.view(2, 3) * 2, (2, 3))
    assert (calls, stored.shape, stored.dtype) == ([], (2, 3), torch.float32)
    assert stored.read().tolist() == [[0, 2, 4], [6, 8, 10]]
    assert calls == ["read", "release"]


def test_what_only_moves_numbers_is_converted_before_it_is_moved():
    source = Stored((2, 3), torch.float32, lambda: torch.arange(6.0).view(2, 3))
    moved = computed([source, source], lambda a, b: torch.cat([a, b]).t().clone(), (3, 4))
    dtypes = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        dtypes.append(tensor.dtype)
        return tensor.clone()

    one = converted(computed([source], count, (2, 3)), torch.bfloat16, "w")
    other = converted(computed([source], count, (2, 3), torch.float32), torch.bfloat16, "w")
    assert one.read().dtype == other.read().dtype == one.dtype == other.dtype == torch.bfloat16
    assert dtypes == [torch.bfloat16, torch.float32]
    assert torch.equal(converted(moved, torch.bfloat16, "w").read(), moved.read().bfloat16())


@pytest.mark.parametrize("moved", [False, True])
def test_a_number_too_large_for_the_dtype_names_its_tensor(moved):
    large = torch.tensor([[1.0, -1e6]])
    stored = Stored((1, 2), torch.float32, lambda: large)
    stored = computed([stored], torch.clone, (1, 2)) if moved else stored
    message = r"^w has numbers up to 1,000,000, and torch\.float16 ends at 65,504: .*bfloat16"
    with pytest.raises(ValueError, match=message):
        converted(stored, torch.float16, "w").read()
    assert converted(stored, torch.bfloat16, "w").read().isfinite().all()


def test_what_was_infinite_or_none_before_stays_so():
    for numbers in ([float("inf"), 1], [float("nan"), 1], [-float("inf"), float("nan")]):
        tensor = torch.tensor(numbers)
        half = converted(Stored((2,), torch.float32, lambda t=tensor: t), torch.float16, "w").read()
        assert torch.equal(half.isinf(), tensor.isinf())
        assert torch.equal(half.isnan(), tensor.isnan())


def test_weights_too_large_for_float16_are_not_loaded_in_it(tmp_path):
    model = small_llama()
    model.layers[1].attention.wk.weight.data[3, 5] = 1e6
    save(tmp_path / "x", model, small_tokenizer())
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.wk\.weight has numbers"):
        load(tmp_path / "x", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.wk\.weight has numbers"):
        convert(tmp_path / "x", tmp_path / "y", "huggingface", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_tensor_in_its_own_dtype_is_not_converted():
    stored = Stored((2,), torch.float32, lambda: torch.ones(2))
    assert converted(stored, torch.float32, "w") is stored
    assert converted(stored, None, "w") is stored
    assert converted(stored, torch.bfloat16, "w").dtype == torch.bfloat16
    assert converted(stored, torch.bfloat16, "w").read().dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_raw_bytes_are_the_numbers_row_by_row(dtype):
    tensor = torch.arange(12).to(dtype).view(3, 4).t()
    assert bytes(raw_bytes(tensor)) == bytes(tensor.contiguous().view(torch.uint8).numpy().data)


# --- Whole models --------------------------------------------------------------------------------


def test_in_the_stored_dtype_the_weights_stay_in_the_file(tmp_path):
    save(tmp_path / "x", small_llama(), small_tokenizer())
    model, _ = load(tmp_path / "x")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs Linux to see what is mapped")
    address = model.layers[0].attention.wq.weight.data_ptr()
    (line,) = [
        line
        for line in maps.read_text().splitlines()
        if int(line.split("-")[0], 16) <= address < int(line.split()[0].split("-")[1], 16)
    ]
    assert line.endswith("model.safetensors")


def test_of_two_dtypes_the_larger_part_decides():
    """GGUF files keep norms in float32 beside matrices in 16 bits; a model computes in one."""
    model = small_llama().bfloat16()
    mixed = {
        name: Stored(tuple(w.shape), torch.float32, w.float) if w.dim() == 1 else stored
        for (name, stored), w in zip(
            checkpoint_of(model, Path("x")).weights.items(),
            model.state_dict().values(),
            strict=True,
        )
    }
    checkpoint = Checkpoint(model.config, mixed, None, Path("x"))
    assert main_dtype(checkpoint) == torch.bfloat16
    assert {p.dtype for p in llama_from(checkpoint).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in llama_from(checkpoint, dtype=torch.float32).parameters()} == {
        torch.float32
    }


def test_a_config_with_absurdly_many_layers_is_refused_at_once():
    stored = checkpoint_of(small_llama(), Path("x")).weights
    with pytest.raises(CheckpointError, match=r"x: the config has 1000000000 layers"):
        Checkpoint(small_config(n_layers=10**9), stored, None, Path("x"))


@pytest.mark.parametrize(
    "sizes", [{"hidden_dim": 10**19}, {"dim": 32 * 10**20}, {"vocab_size": 2**61}]
)
def test_sizes_that_pytorch_cannot_count_are_refused(sizes):
    stored = checkpoint_of(small_llama(), Path("x")).weights
    with pytest.raises(CheckpointError, match=r"x: no model can have these sizes: .*damaged"):
        Checkpoint(small_config(**sizes), stored, None, Path("x"))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": "32"}, "dim is '32', but must be of type int"),
        ({"dim": 32.0}, "dim is 32.0, but must be of type int"),
        ({"n_layers": True}, "n_layers is True"),
        ({"tie_embeddings": 1}, "tie_embeddings is 1, but must be of type bool"),
        ({"norm_eps": None}, "norm_eps is None, but must be of type float"),
        ({"dim": 33}, "dim .* must be n_heads"),
        ({"other": 1}, ".* exactly the keys"),
    ],
)
def test_sizes_that_cannot_be_name_their_file(sizes, message):
    with pytest.raises(
        CheckpointError, match=rf"a/params\.json is no config of a model: {message}"
    ):
        config_of(Path("a/params.json"), small_config().to_dict() | sizes)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@torch.no_grad()
def test_weights_in_few_bits_are_those_of_quantize_and_can_be_saved(tmp_path, kind, tied):
    from minillama.adapt.quantize import quantize

    tokens = torch.arange(12)[None]
    save(tmp_path / "whole", small_llama(tie_embeddings=tied), small_tokenizer())
    model, _ = load(tmp_path / "whole", quantize=kind)
    expected = quantize(small_llama(tie_embeddings=tied), kind)
    assert torch.equal(model(tokens), expected(tokens))
    save(tmp_path / kind, model, small_tokenizer())
    again, _ = load(tmp_path / kind)
    assert torch.equal(again(tokens), expected(tokens))
    with pytest.raises(ValueError, match=f"holds weights in {kind} already"):
        load(tmp_path / kind, quantize="int8")
    for format in ("huggingface", "meta", "gguf", "llama2.c"):
        with pytest.raises(ValueError, match=f"in {kind}, packed as minillama does it"):
            save(tmp_path / "x", model, small_tokenizer(), format=format)


def test_a_device_gets_its_own_copy(tmp_path):
    save(tmp_path / "x", small_llama(), small_tokenizer())
    model, _ = load(tmp_path / "x", device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


# --- How much memory it takes --------------------------------------------------------------------

MEASURE = """
import sys, time
from pathlib import Path
import torch
from minillama import load
from minillama.checkpoint import convert
torch.set_num_threads(1)
source, what, dtype = sys.argv[1:4]

def peak():  # bytes
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("VmHWM:")[1].split()[0])

load(sys.argv[4])  # once, so that everything is imported
Path("/proc/self/clear_refs").write_text("5")  # from here on
before, start = peak(), time.perf_counter()
if what == "load":
    model, _ = load(source, dtype=getattr(torch, dtype) if dtype != "None" else None)
    seconds = time.perf_counter() - start
    total = sum(p.sum().item() for p in model.parameters())  # every page is read
    size = sum(p.nbytes for p in model.parameters())
else:
    convert(source, Path(source).parent / f"{what}{dtype}", what, getattr(torch, dtype, None))
    seconds, size = time.perf_counter() - start, 0
print(peak() - before, size, seconds)
"""
LARGE = {"dim": 768, "n_heads": 12, "n_kv_heads": 4, "hidden_dim": 2048, "n_layers": 12}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """300 MB in float32, and a small one for warming up."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    model = small_llama(**LARGE)
    for parameter in model.parameters():
        parameter.uniform_(-1, 1, generator=generator)
    for format in ("native", "huggingface", "meta"):
        options = {"shards": 4} if format == "meta" else {}
        save(folder / format, model, small_tokenizer(), format=format, **options)
    save(folder / "small", small_llama(), small_tokenizer())
    return folder


def measure(large: Path, format: str, what: str, dtype: str) -> tuple[float, float, float]:
    """(bytes at the peak, bytes of the weights, seconds until the model was there)."""
    command = [sys.executable, "-c", MEASURE, large / format, what, dtype, large / "small"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    peak, size, seconds = map(float, run.stdout.split())
    return peak, size, seconds


needs_linux = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to measure a peak"
)


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize("dtype", ["None", "bfloat16"])
@pytest.mark.parametrize("format", ["native", "huggingface", "meta"])
def test_loading_takes_the_weights_in_their_target_dtype_and_a_tenth_at_most(large, format, dtype):
    peak, size, seconds = measure(large, format, "load", dtype)
    assert size > (3e8 if dtype == "None" else 1.5e8)
    assert 0.95 * size < peak < 1.1 * size
    if (format, dtype) == ("native", "None"):
        assert seconds < 1  # what is mapped opens at once


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize("target", ["native", "meta", "gguf"])
def test_converting_takes_a_few_tensors(large, target):
    peak, _, _ = measure(large, "meta", target, "bfloat16")
    assert peak < 0.2 * 3e8


def test_room_is_asked_for_before_a_weight_is_read(tmp_path, monkeypatch):
    save(tmp_path / "x", small_llama(), small_tokenizer(), format="huggingface")
    monkeypatch.setattr(weights, "free_memory", lambda device: 2**16)
    monkeypatch.setattr(weights, "release_pages", lambda view: pytest.fail("a weight was read"))
    with pytest.raises(ValueError, match=r"takes .* MiB .*, but only 0\.1 MiB"):
        load(tmp_path / "x", dtype=torch.bfloat16)
