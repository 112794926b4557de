# SPDX-License-Identifier: MIT
"""What every op promises, over the table of ops: how it meets torch, whatever it computes."""

import contextlib
import copy
import pathlib
import sys

import pytest
import torch
from helpers import DTYPES, REFERENCE_AND_AUTO, REFERENCE_AND_CPU, largest_error, needs_extension
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mmattn
from mmattn import dispatch
from mmattn_kernels.cpu import attention as cpu_attention
from mmattn_kernels.cpu import extension

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bench"))

from registry import ENTRIES, OPS

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def tensors_of(value):
    """The tensors in arguments or results, in their order."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [x for y in values for x in tensors_of(y)]


def replaced(value, tensors):
    """The same arguments with the next of these tensors for each."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {name: replaced(x, tensors) for name, x in value.items()}
    return type(value)(replaced(x, tensors) for x in value) if isinstance(value, (tuple, list)) else value


class Call:
    """An op on small arguments: `leaves` are its tensors, of which calling it makes a list of outputs."""

    def __init__(self, op, dtype=torch.float32, **sizes):
        self.function, self.arguments = getattr(mmattn, op.function), op.make(dtype, **sizes)
        self.leaves = tensors_of(self.arguments)

    def __call__(self, *leaves, impl="cpu"):
        tensors, options = replaced(self.arguments, iter(leaves or self.leaves))
        if "windows" in options:
            options = {**options, "windows": options["windows"].to(tensors[0].device)}
        return tensors_of(self.function(*tensors, **options, impl=impl))

    def fresh(self, requires_grad=True):
        return [x.detach().clone().requires_grad_(requires_grad) for x in self.leaves]

    def results(self, function=None, impl="cpu"):
        """Outputs and the gradients of all tensors, by number."""
        leaves = self.fresh()
        out = function(*leaves) if function else self(*leaves, impl=impl)
        torch.manual_seed(1)
        torch.autograd.backward(out, [torch.randn(x.shape).to(x.dtype) for x in out])
        return dict(enumerate([*(x.detach() for x in out), *(x.grad for x in leaves)]))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


def test_the_table_has_every_public_op_and_every_registered_one():
    public = {name for name in mmattn.__all__ if getattr(getattr(mmattn, name), "__module__", "") in MODULES}
    assert public - {"draw_shift", "merge_attention"} == set(OPS)
    ours = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mmattn::")}
    assert ours == {f"mmattn::{op.op}{suffix}" for op in OPS.values() for suffix in ("", "_backward")}
    assert {name for entry in ENTRIES.values() for name in entry.functions} <= set(OPS)


MODULES = {f"mmattn.{name}" for name in ("attention", "self_attention", "segmented_attention", "norm", "conv")}


@every_op
def test_results_are_the_references_and_contiguous(op, poisoned_memory):
    if reason := dispatch.support(op.function, "cpu", "cpu", torch.float32, 16).reason:
        pytest.skip(reason)
    found, definition = Call(op).results(), Call(op).results(impl="reference")
    assert largest_error(found, definition) < 1e-5
    assert all(x.is_contiguous() for x in Call(op)()) and all(torch.isfinite(x).all() for x in found.values())


@needs_extension
@every_dtype
@every_op
def test_two_runs_are_bitwise_equal(op, dtype, poisoned_memory):
    assert equal(Call(op, dtype, length=70).results(), Call(op, dtype, length=70).results())


@needs_extension
@pytest.mark.parametrize(
    "op", [op for op in OPS.values() if dispatch.OPS[op.function] == "attention"], ids=lambda op: op.function
)
def test_all_directions_of_attention_are_one_kernel_call(op, monkeypatch):
    calls = []

    class Recorder:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(extension(), name)

    monkeypatch.setattr(cpu_attention, "extension", Recorder)
    Call(op).results()
    assert calls == ["attention_forward", "attention_backward"]


@needs_extension
@every_dtype
@every_op
def test_inputs_are_unchanged(op, dtype):
    call = Call(op, dtype)
    before = [x.clone() for x in call.leaves]
    leaves = [x.requires_grad_() for x in call.leaves]
    out = call()
    d_out = [torch.ones_like(x) for x in out]
    torch.autograd.grad(out, leaves, d_out)
    assert all(map(torch.equal, before, call.leaves)) and all((x == 1).all() for x in d_out)


@needs_extension
@every_op
def test_only_one_tensor_requires_grad(op, poisoned_memory):
    call = Call(op)
    everything = call.results()
    outputs = len(call())
    for i in range(len(call.leaves)):
        leaves = [x.requires_grad_(i == j) for j, x in enumerate(call.fresh(False))]
        out = call(*leaves)
        torch.manual_seed(1)
        torch.autograd.backward(out, [torch.randn(x.shape) for x in out])
        assert [x.grad is not None for x in leaves] == [i == j for j in range(len(leaves))]
        assert largest_error({0: leaves[i].grad}, {0: everything[outputs + i]}) < 1e-5, i


@needs_extension
@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode))
@every_op
def test_without_gradients(op, context, poisoned_memory):
    call = Call(op)
    definition = [x.detach() for x in call(*call.fresh(), impl="reference")]
    leaves = call.fresh()
    with context():
        out = call(*leaves)
    assert not any(x.requires_grad for x in out)
    assert largest_error(dict(enumerate(out)), dict(enumerate(definition))) < 1e-5


@pytest.mark.parametrize("impl", REFERENCE_AND_CPU)
@every_op
def test_an_empty_batch(op, impl):
    call = Call(op)
    batch = call.leaves[0].shape[0]
    # What belongs to the batch has its size in front; parameters have none.
    empty = [x[:0] if x.shape[0] == batch else x for x in call.leaves]
    call.leaves = empty
    found = call.results(impl=impl)
    outputs = [x for i, x in found.items() if i < len(found) - len(empty)]
    assert all(x.shape[0] == 0 for x in outputs)
    for x, gradient in zip(empty, list(found.values())[len(outputs) :], strict=True):
        assert gradient.shape == x.shape and not gradient.any()


class Recorded(TorchDispatchMode):
    """The calls of torch.ops.mmattn while it is open, as (op, arguments)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mmattn":
            self.calls.append((func, [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args]))
        return func(*args, **(kwargs or {}))


@needs_extension
@every_op
def test_opcheck(op):
    """Forward and backward, with and without gradients: schema, fake kernel, autograd registration, compiled code."""
    with Recorded() as recorded:
        Call(op).results()
    (forward, arguments), (backward, of_backward) = recorded.calls
    assert forward is getattr(torch.ops.mmattn, op.op).default and backward.__name__.startswith(f"{op.op}_backward")
    torch.library.opcheck(forward, copy.deepcopy(arguments))
    torch.library.opcheck(backward, of_backward)
    leaves = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    torch.library.opcheck(forward, leaves)


@pytest.mark.parametrize("impl", REFERENCE_AND_AUTO)
@every_op
def test_compiled_as_one_graph(op, impl, fresh_dynamo):
    """And a new length compiles nothing anew, once lengths are known to change."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    counts = []
    compiled = torch.compile(lambda call, *leaves: call(*leaves, impl=impl), fullgraph=True, backend=counter)
    for length in (6, 9, 7, 12, 10):
        of_length = Call(op, length=length)
        found = of_length.results(lambda *leaves: compiled(of_length, *leaves))  # noqa: B023  called at once
        assert largest_error(found, of_length.results(impl=impl)) < 1e-6
        counts.append(counter.frame_count)
    # torch's own convolution of images is compiled once more.
    first = 2 if impl == "reference" else 1
    assert counts[first] == counts[-1] <= first + 1


@needs_extension
@pytest.mark.parametrize("reentrant", (False, True), ids=("not reentrant", "reentrant"))
@every_op
def test_checkpoint(op, reentrant):
    call = Call(op)

    def checkpointed(*leaves):
        return checkpoint(lambda *x: tuple(call(*x)), *leaves, use_reentrant=reentrant)

    assert equal(call.results(checkpointed), call.results())


@needs_extension
@every_op
def test_autocast(op):
    call = Call(op)
    with torch.autocast("cpu", torch.bfloat16):
        found = call.results(impl="auto")
        of_double = Call(op, torch.float64)(impl="auto")
    outputs = range(len(of_double))
    expected = torch.float32 if op.keeps_dtype else torch.bfloat16
    assert all(found[i].dtype == expected for i in outputs) and all(x.dtype == torch.float64 for x in of_double)
    assert all(x.dtype == torch.float32 and torch.isfinite(x).all() for i, x in found.items() if i not in outputs)
    assert largest_error({i: found[i] for i in outputs}, {i: call.results()[i] for i in outputs}) < 2e-2


@needs_extension
@every_op
def test_a_second_derivative_is_refused(op):
    call = Call(op)
    leaves = call.fresh()
    (grad,) = torch.autograd.grad(call(*leaves)[0].square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op.op} is differentiable once; impl='reference' as often as wanted"):
        grad.sum().backward()


@needs_extension
@every_op
def test_forward_mode_is_refused(op):
    call = Call(op)
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda x: call(x, *call.leaves[1:])[0], (call.leaves[0],), (call.leaves[0],))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"(?i)forward"):
        call(torch.autograd.forward_ad.make_dual(call.leaves[0], call.leaves[0]), *call.leaves[1:])


@every_op
def test_on_meta_it_tells_the_shapes(op):
    call = Call(op)
    found = call(*(x.to("meta") for x in call.leaves), impl="auto")
    assert [(x.shape, x.dtype, x.device.type) for x in found] == [
        (x.shape, x.dtype, "meta") for x in call(impl="reference")
    ]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16), ids=("fp64", "fp16"))
@every_op
def test_dtypes_without_kernels_run_the_reference_and_say_so(op, dtype):
    call = Call(op, dtype)
    fp16 = dtype == torch.float16
    warned = pytest.warns(UserWarning, match=r"slow reference.*float16") if fp16 else contextlib.nullcontext()
    with warned:
        found = call.results(impl="auto")
    assert found[0].dtype == dtype and equal(found, call.results(impl="reference"))


@every_op
def test_an_impl_that_cannot_run_says_why(op, monkeypatch):
    call, of_double = Call(op), Call(op, torch.float64)
    with pytest.raises(ValueError, match="impl is 'cuda'; expected one of 'auto', 'reference'"):
        call(impl="cuda")
    with pytest.raises(RuntimeError, match=f"impl 'cpu' cannot run {op.function} here: .*torch.float64"):
        of_double(impl="cpu")
    with pytest.raises(RuntimeError, match=f"impl 'cpu' cannot run {op.function} here: .*meta"):
        call(*(x.to("meta") for x in call.leaves), impl="cpu")
    monkeypatch.setenv("MMATTN_IMPL", "cpu")
    with pytest.raises(RuntimeError, match=f"impl 'cpu' cannot run {op.function}"):
        of_double(impl="auto")
    assert of_double(impl="reference")[0].dtype == torch.float64
    monkeypatch.setenv("MMATTN_IMPL", "reference")
    assert all(map(torch.equal, call(impl="auto"), call(impl="reference")))
    monkeypatch.setenv("MMATTN_IMPL", "fast")
    with pytest.raises(ValueError, match="MMATTN_IMPL is 'fast'; expected one of"):
        call(impl="auto")


@every_op
def test_a_missing_tensor_is_refused_by_name(op):
    call = Call(op)
    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context, pytest.raises(TypeError, match=r"is a NoneType; expected a tensor"):
            call(call.leaves[0], None, *call.leaves[2:], impl="auto")
