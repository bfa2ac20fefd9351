"""Attention over packed documents and context-parallel ranks against its specification.

float64: a softmax over a dozen scores, its parts merged in another order; relative to the largest value.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mcore_spec.config import RopeConfig
from mcore_spec.layers.attention import KeyValue, ttt_attention, ttt_attention_reference
from mcore_spec.layers.flash import CudaKernel, Flash, HostKernel, Kernel, ReadableKernel, kernel_for
from mcore_spec.layers.rotary import RotaryEmbedding
from mcore_spec.parallel.documents import Documents
from tests.unit.document_cases import documents_of_ranks

ROUNDING = 1e-12
HEAD_DIM = 8
# One row, two, an odd number, and more than one of the rest.
BOUNDS = [0, 1, 3, 8, 14]
KERNELS: list[Kernel | None] = [None, ReadableKernel()]
KERNEL_NAMES = ["fastest", "readable"]


class Inputs(NamedTuple):
    """Queries of the last step, keys and values of every step, and the weights of a sum over the output."""

    query: Tensor
    steps: list[KeyValue]
    weight: Tensor

    def leaves(self) -> list[Tensor]:
        return [self.query, *(tensor for step in self.steps for tensor in step)]


def inputs(num_steps: int, *, rows: int, heads: tuple[int, int] = (4, 2), seed: int = 1) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def random(num_heads: int) -> Tensor:
        return torch.randn(rows, 1, num_heads, HEAD_DIM, generator=generator, dtype=torch.float64).requires_grad_()

    steps = [KeyValue(random(heads[1]), random(heads[1])) for _ in range(num_steps)]
    return Inputs(random(heads[0]), steps, random(heads[0]).detach())


def reference(given: Inputs, documents: Documents | None) -> Tensor:
    first, *own = given.steps
    empty = first.key.new_zeros(0, *first.key.shape)
    keys = torch.stack([step.key for step in own]) if own else empty
    values = torch.stack([step.value for step in own]) if own else empty
    return ttt_attention_reference(given.query, first, keys, values, documents=documents)


def gradients(output: Tensor, given: Inputs) -> list[Tensor]:
    return list(torch.autograd.grad((output * given.weight.to(output.dtype)).sum(), given.leaves()))


def check(found: Sequence[Tensor], expected: Sequence[Tensor], *, bound: float = ROUNDING) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= bound * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("kernel", KERNELS, ids=KERNEL_NAMES)
@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_packed_documents_equal_the_specification(
    heads: tuple[int, int], num_steps: int, kernel: Kernel | None
) -> None:
    given, documents = inputs(num_steps, rows=BOUNDS[-1], heads=heads), Documents(BOUNDS)
    found = ttt_attention(given.query, given.steps, documents=documents, kernel=kernel)
    expected = reference(given, documents)
    check([found, *gradients(found, given)], [expected, *gradients(expected, given)])


@pytest.mark.parametrize("num_steps", [1, 4])
def test_the_specification_is_each_document_alone(num_steps: int) -> None:
    given = inputs(num_steps, rows=BOUNDS[-1])
    alone = []
    for start, stop in pairwise(BOUNDS):
        steps = [KeyValue(*(tensor[start:stop] for tensor in step)) for step in given.steps]
        alone.append(reference(Inputs(given.query[start:stop], steps, given.weight), None))
    with torch.no_grad():
        check([reference(given, Documents(BOUNDS))], [torch.cat(alone)])


@pytest.mark.parametrize("kernel", KERNELS, ids=KERNEL_NAMES)
@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_equal_the_specification(size: int, num_steps: int, kernel: Kernel | None) -> None:
    """Each rank has some rows of every step but the first; what it gives to a key is one term of the gradient."""
    bounds = [0, 2 * size, 8 * size, 12 * size]
    given = inputs(num_steps, rows=bounds[-1])
    output = torch.zeros_like(given.query)
    for documents in documents_of_ranks(bounds, size):
        first, *own = given.steps
        local = [KeyValue(*(documents.take(tensor) for tensor in step)) for step in own]
        rows = ttt_attention(documents.take(given.query), [first, *local], documents=documents, kernel=kernel)
        output = output.index_copy(0, documents.row_index, rows)
    expected = reference(given, Documents(bounds))
    check([output, *gradients(output, given)], [expected, *gradients(expected, given)])


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e3])
def test_flat_and_sharp_attention(scale: float) -> None:
    """Merging must not overflow where one piece's scores are far above another's."""
    documents = documents_of_ranks([0, 8, 20], 2)[1]
    given = inputs(3, rows=20)
    given = given._replace(query=(given.query * scale).detach().requires_grad_())
    first, *own = given.steps
    local = [KeyValue(*(documents.take(tensor) for tensor in step)) for step in own]
    found = ttt_attention(documents.take(given.query), [first, *local], documents=documents)
    expected = documents.take(reference(given, Documents([0, 8, 20])))
    given = given._replace(weight=documents.take(given.weight))
    check([found], [expected])
    check(gradients(found, given), gradients(expected, given), bound=ROUNDING * max(1.0, scale))


@pytest.mark.parametrize("kernel", KERNELS, ids=KERNEL_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_what_they_are(dtype: torch.dtype, kernel: Kernel | None) -> None:
    """A few roundings of values of order one, also where a key's gradient is a sum over pieces."""
    documents, whole = documents_of_ranks([0, 8, 20], 2)[1], inputs(3, rows=20)
    first, *own = whole.steps
    local = [first, *(KeyValue(*(documents.take(tensor).detach() for tensor in step)) for step in own)]
    wide = Inputs(
        documents.take(whole.query).detach().requires_grad_(),
        [KeyValue(*(tensor.detach().requires_grad_() for tensor in step)) for step in local],
        documents.take(whole.weight),
    )
    low = Inputs(
        wide.query.detach().to(dtype).requires_grad_(),
        [KeyValue(*(tensor.detach().to(dtype).requires_grad_() for tensor in step)) for step in wide.steps],
        wide.weight,
    )
    found = ttt_attention(low.query, low.steps, documents=documents, kernel=kernel)
    expected = ttt_attention(wide.query, wide.steps, documents=documents)
    results, exact = [found, *gradients(found, low)], [expected, *gradients(expected, wide)]
    assert all(tensor.dtype is dtype for tensor in results)
    check(results, exact, bound=16 * torch.finfo(dtype).eps)


def test_the_gradient_of_a_plain_sum() -> None:
    """It comes as one number with strides of zero, which a kernel could take for a layout."""
    given, documents = inputs(3, rows=BOUNDS[-1]), Documents(BOUNDS)
    for each in (documents, None):
        found = torch.autograd.grad(ttt_attention(given.query, given.steps, documents=each).sum(), given.leaves())
        expected = torch.autograd.grad(reference(given, each).sum(), given.leaves())
        check(found, expected)


def test_no_scores_are_kept() -> None:
    """What is saved for backward grows with the rows, not with their square, and earlier steps are not copied."""
    length, num_steps = 200, 4
    for each in (Documents([0, length // 2, length]), Documents([0, length])):
        given = inputs(num_steps, rows=length, heads=(2, 1))
        saved: dict[int, int] = {}

        def note(tensor: Tensor, *, into: dict[int, int] = saved) -> Tensor:
            into[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = ttt_attention(given.query, given.steps, documents=each)
        for tensor in (*given.leaves(), output):
            saved.pop(tensor.untyped_storage().data_ptr(), None)
        # Beside inputs and output: a log-sum-exp and k - 1 weights a query.
        assert sum(saved.values()) <= num_steps * length * 2 * output.element_size()


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("heads", [(3, 3), (6, 2)])
def test_kernels_agree_on_a_part_of_a_softmax(heads: tuple[int, int], is_causal: bool) -> None:
    """Backward is called with the output and the log-sum-exp of more keys than the piece has."""
    generator = torch.Generator().manual_seed(2)
    queries, keys = (2, heads[0], 5, HEAD_DIM), (2, heads[1], 5 if is_causal else 7, HEAD_DIM)
    query, key, value, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (queries, keys, keys, queries)
    )
    host, readable = HostKernel(), ReadableKernel()
    found = [kernel.forward(query, key, value, is_causal=is_causal, scale=0.3) for kernel in (host, readable)]
    check(found[0][:2], found[1][:2])
    whole = Flash(found[0].output + 0.1, found[0].lse + 0.7)
    check(
        host.backward(grad, query, key, value, whole, is_causal=is_causal, scale=0.3),
        readable.backward(grad, query, key, value, whole, is_causal=is_causal, scale=0.3),
    )


class Calls(TorchDispatchMode):
    """The operators that are called, their arguments by the names in torch's declarations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        declared = func._schema.arguments
        named = {argument.name: argument.default_value for argument in declared}
        named |= dict(zip((argument.name for argument in declared), args, strict=False))
        self.seen.append({**named, **(kwargs or {}), "operator": func._schema.name})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_cuda_kernel_hands_its_operators_what_they_take(is_causal: bool) -> None:
    """Shapes and arguments only: meta tensors go through torch's own declarations of the two operators."""
    keys = 5 if is_causal else 7
    query = torch.empty(1, 6, 5, 16, dtype=torch.bfloat16, device="meta")
    key, value = (torch.empty(1, 2, keys, 16, dtype=torch.bfloat16, device="meta") for _ in range(2))
    grad, kernel = torch.empty_like(query), CudaKernel()
    with Calls() as calls:
        flash = kernel.forward(query, key, value, is_causal=is_causal, scale=0.3)
        found = kernel.backward(grad, query, key, value, flash, is_causal=is_causal, scale=0.3)
    assert flash.output.shape == query.shape
    assert flash.lse.shape == query.shape[:3]
    assert flash.lse.dtype is torch.float32
    assert [x.shape for x in found] == [query.shape, key.shape, key.shape]
    shared = {"query": query, "key": key, "value": value, "dropout_p": 0.0, "is_causal": is_causal, "scale": 0.3}
    forward = {**shared, "operator": "aten::_scaled_dot_product_flash_attention", "return_debug_mask": False}
    backward = {**shared, "operator": "aten::_scaled_dot_product_flash_attention_backward", "grad_out": grad}
    backward |= {"out": flash.output, "logsumexp": flash.lse, "max_q": 5, "max_k": keys}
    backward |= {"philox_seed": flash.saved[4], "philox_offset": flash.saved[5]}
    backward |= {"cum_seq_q": None, "cum_seq_k": None}
    for expected, seen in zip((forward, backward), calls.seen, strict=True):
        for name, value in expected.items():
            assert seen[name] is value if isinstance(value, Tensor) else seen[name] == value, name


def test_the_kernel_follows_the_device() -> None:
    assert isinstance(kernel_for(torch.empty(1, 8)), HostKernel)
    assert isinstance(kernel_for(torch.empty(1, 8, dtype=torch.bfloat16, device="meta")), ReadableKernel)


LONGROPE = RopeConfig(
    theta=100.0,
    rope_type="longrope",
    scaling={
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [3.0, 4.0, 5.0, 6.0],
        "original_max_position_embeddings": 4,
        "factor": 2.0,
    },
)


@pytest.mark.parametrize("rope", [RopeConfig(theta=100.0), LONGROPE], ids=["default", "longrope"])
def test_rotary_tables_are_chosen_row_by_row(rope: RopeConfig) -> None:
    rotary = RotaryEmbedding(rope, HEAD_DIM)
    lengths = [3, 9, 4, 5]
    positions = [torch.arange(length) for length in lengths]
    each = torch.cat([torch.full((length,), length) for length in lengths])
    found = rotary.angles(torch.cat(positions), sequence_length=each)
    alone = [rotary.angles(at, sequence_length=n) for at, n in zip(positions, lengths, strict=True)]
    assert torch.equal(found, torch.cat(alone))
    assert torch.equal(alone[1][:3], alone[0]) == (rope.rope_type == "default")
