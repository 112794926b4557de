# SPDX-License-Identifier: MIT
"""Gradients of parts of a network that the extension runs by one call: bit for bit those of their functions."""

import contextlib
import random
import sys
import threading
from typing import ClassVar

import pytest
import torch
from helpers import SMALL_UNET, fill, needs_extension
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mmattn
from mmattn import RandomShiftAttention, _replay
from mmdiffusion import CoupledUNet
from mmdiffusion.model import blocks
from mmdiffusion.model.blocks import AudioBlock, SelfAttention, SpatialAttention, TemporalAttention, VideoBlock

pytestmark = needs_extension


@pytest.fixture(autouse=True)
def _at_first_sight(monkeypatch):
    monkeypatch.setattr(_replay, "records_at_second_sight", False)


@pytest.fixture
def replays(monkeypatch):
    """The gradients that were replayed since the list was cleared, in their order."""
    from mmattn_kernels.cpu.plan_gradients import Gradients

    found = []
    run = Gradients.run

    def counted(gradients, *arguments):
        found.append(gradients)
        return run(gradients, *arguments)

    monkeypatch.setattr(Gradients, "run", counted)
    return found


@contextlib.contextmanager
def by_the_functions():
    """No part is replayed while it is open."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_replay, "LARGEST", 0)
        yield


class Case:
    """A block in training and its inputs."""

    BLOCKS: ClassVar = {
        "self-attention": lambda: (SelfAttention(64, 2), (20, 64)),
        "attention in frames": lambda: (SpatialAttention(64, 2), (4, 3, 3, 64)),
        "attention over frames": lambda: (TemporalAttention(64, 2), (4, 3, 3, 64)),
        "audio": lambda: (AudioBlock(64, 64, dilation=2, num_heads=0, resampling=None, dropout=0.0), (20, 64)),
        "wider audio": lambda: (AudioBlock(32, 64, dilation=2, num_heads=2, resampling=None, dropout=0.0), (20, 32)),
        "longer audio": lambda: (AudioBlock(64, 64, dilation=1, num_heads=0, resampling="up", dropout=0.0), (20, 64)),
        "video": lambda: (VideoBlock(64, 64, num_heads=2, resampling=None, dropout=0.0), (4, 3, 3, 64)),
        "wider video": lambda: (VideoBlock(32, 64, num_heads=0, resampling=None, dropout=0.0), (4, 3, 3, 32)),
        "larger video": lambda: (VideoBlock(32, 64, num_heads=0, resampling="up", dropout=0.0), (4, 3, 3, 32)),
        "both": lambda: (RandomShiftAttention(64, num_heads=2, window=2), (4, 3, 3, 64)),
    }
    PARTS: ClassVar = {"wider audio": 2, "video": 3}

    def __init__(self, name="self-attention", batch=2, dtype=torch.float32):
        module, shape = self.BLOCKS[name]()
        generator = torch.Generator().manual_seed(1)

        def random(*shape):
            return torch.randn(batch, *shape, generator=generator).to(dtype).requires_grad_()

        self.module, self.inputs = fill(module).to(dtype), [random(*shape)]
        if name == "both":
            self.inputs.append(random(27, 64))
        elif not isinstance(module, SelfAttention):
            self.inputs.append(random(128))
        self.parts = self.PARTS.get(name, 1)

    def __call__(self):
        x, *others = self.inputs
        if isinstance(self.module, RandomShiftAttention):
            return self.module(x.permute(0, 1, 4, 2, 3), others[0].transpose(1, 2), shift=1)
        return (self.module(x, *others, **({"is_film": True} if others else {})),)

    def gradients(self, which=None, leaves=None, **options):
        """Of the results, or those of the numbers `which`, in all leaves."""
        results = self()
        results = [results[at] for at in which or range(len(results))]
        generator = torch.Generator().manual_seed(2)
        d_results = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
        leaves = self.leaves() if leaves is None else leaves
        found = torch.autograd.grad(results, leaves, d_results, allow_unused=True, **options)
        return [x.detach() for x in results], found

    def leaves(self):
        return [x for x in (*self.inputs, *self.module.parameters()) if x.requires_grad]

    def expected(self, **options):
        with by_the_functions():
            return self.gradients(**options)


def equal(found, expected):
    for x, y in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        if (x is None) != (y is None) or (x is not None and not (torch.equal(x, y) and x.dtype == y.dtype)):
            return False
    return True


every_block = pytest.mark.parametrize("name", Case.BLOCKS)


@every_block
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("batch", (1, 3))
def test_gradients_are_those_of_the_functions(name, dtype, batch, replays):
    case = Case(name, batch, dtype)
    expected = case.expected()
    assert not replays and equal(case.gradients(), expected)
    replays.clear()
    assert equal(case.gradients(), expected) and len(replays) == case.parts
    assert all(x is not None for x in expected[1])


@every_block
def test_of_parameters_in_float32_beside_bfloat16(name, replays):
    case = Case(name, dtype=torch.bfloat16)
    for norm in (x for x in case.module.modules() if isinstance(x, nn.GroupNorm)):
        norm.float()
    assert all(equal(case.gradients(), case.expected()) for _ in range(2)) and replays


@pytest.mark.parametrize("which", ((0,), (1,)), ids=("video", "audio"))
def test_where_one_result_has_no_gradient(which, replays):
    case = Case("both")
    case.gradients()
    replays.clear()
    found = case.gradients(which=which)
    assert equal(found, case.expected(which=which)) and replays
    assert sum(x is None for x in found[1]) == 2  # the other stream's output projection


def freeze_all(_module):
    return True


def freeze_norms(module):
    return isinstance(module, nn.GroupNorm)


def freeze_convolutions(module):
    return not isinstance(module, nn.GroupNorm)


@every_block
@pytest.mark.parametrize("is_frozen", (freeze_all, freeze_norms, freeze_convolutions), ids=lambda f: f.__name__)
@pytest.mark.parametrize("of_inputs", (True, False), ids=("inputs", "no inputs"))
def test_what_is_frozen_has_no_gradient(name, is_frozen, of_inputs, replays):
    case = Case(name)
    for x in case.inputs:
        x.requires_grad_(of_inputs)
    for module in case.module.modules():
        if not list(module.children()):
            module.requires_grad_(not is_frozen(module))
    if not case.leaves():
        assert not case()[0].requires_grad and not case()[0].requires_grad
        return
    expected = case.expected()
    assert equal(case.gradients(), expected) and equal(case.gradients(), expected)


@every_block
def test_of_one_leaf_alone(name):
    case = Case(name)
    case.gradients()
    for leaf in case.leaves():
        assert equal(case.gradients(leaves=[leaf]), case.expected(leaves=[leaf]))


@every_block
def test_again_and_accumulated(name):
    case = Case(name)
    expected = case.expected()
    case.gradients()
    results = case()
    generator = torch.Generator().manual_seed(2)
    d_results = [torch.randn(x.shape, generator=generator) for x in results]
    kept = [d.clone() for d in d_results]
    for _ in range(2):
        found = torch.autograd.grad(results, case.leaves(), d_results, retain_graph=True)
        assert equal(([x.detach() for x in results], found), expected)
    assert all(map(torch.equal, d_results, kept))
    for _ in range(2):
        torch.autograd.backward(results, d_results, retain_graph=True)
    assert all(torch.equal(leaf.grad, 2 * d) for leaf, d in zip(case.leaves(), expected[1], strict=True))


def test_gradients_of_gradients_are_refused():
    case = Case()
    case.gradients()
    _, found = case.gradients(create_graph=True)
    assert equal(((), found), ((), case.expected()[1]))
    with pytest.raises(RuntimeError, match="differentiable once"):
        found[0].sum().backward()


@every_block
def test_training_follows_the_parameters(name, replays):
    """Weights change in every step, also past torch's counters of versions, and are packed anew."""
    cases = Case(name), Case(name)
    for step in range(3):
        for case, is_expected in zip(cases, (False, True), strict=True):
            _, found = case.expected() if is_expected else case.gradients()
            for leaf, d in zip(case.leaves(), found, strict=True):
                if step % 2:
                    leaf.data -= 0.1 * d
                else:
                    with torch.no_grad():
                        leaf -= 0.1 * d
    assert replays and equal((cases[0].leaves(), ()), (cases[1].leaves(), ()))


def test_a_network_is_trained_as_by_the_functions(replays):
    """To the bit: torch's engine adds what several calls make of one tensor in the same order."""

    def losses(steps):
        torch.manual_seed(0)
        unet = fill(CoupledUNet(**SMALL_UNET)).train()
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(1)
        video, audio = torch.randn(1, 4, 3, 8, 8, generator=generator), torch.randn(1, 1, 64, generator=generator)
        found = []
        for _ in range(steps):
            out = unet(video, audio, timesteps=500, shifts=[0] * len(unet.shift_ranges()))
            loss = (out[0] - video).square().mean() + (out[1] - audio).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return torch.tensor(found)

    found = losses(6)
    assert replays
    with by_the_functions():
        expected = losses(6)
    assert torch.equal(found, expected) and found[-1] < found[0]


def test_changes_between_forward_and_backward():
    case = Case("audio")
    case.gradients()
    out = case()[0].sum()
    with torch.no_grad():
        case.module.conv1.bias += 1  # no gradient depends on it
    torch.autograd.grad(out, case.leaves(), retain_graph=True)
    with torch.no_grad():
        case.module.conv1.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, case.leaves())


def test_memory_freed_between_forward_and_backward_is_refused():
    case = Case("audio")
    case.gradients()
    out = case()[0].sum()
    case.module.conv1.weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="saved tensor"):
        torch.autograd.grad(out, case.leaves())


@pytest.mark.parametrize("change", ("cut", "double", "transposed"))
def test_other_tensors_in_the_place_of_saved_ones_are_refused(change):
    case = Case("audio")
    case.gradients()
    out = case()[0]
    unpacked = {"cut": lambda x: x[:0], "double": torch.Tensor.double, "transposed": lambda x: x.mT.contiguous().mT}
    out.grad_fn._raw_saved_tensors[0].register_hooks(lambda x: x.detach(), unpacked[change])
    with pytest.raises(ValueError, match="saved tensor"):
        out.sum().backward()


def test_equal_tensors_in_the_place_of_saved_ones():
    case = Case("audio")
    expected = case.expected()
    case.gradients()
    results = case()
    results[0].grad_fn._raw_saved_tensors[0].register_hooks(lambda x: x.detach().numpy(), torch.tensor)
    d = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(2))
    assert equal(((), torch.autograd.grad(results, case.leaves(), d)), ((), expected[1]))


@every_block
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_under_a_checkpoint(name, use_reentrant):
    """What one that counts saved tensors sees must not depend on whether the call was recorded."""
    case = Case(name)
    expected = case.expected()
    d_results = [torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) for x in expected[0]]
    for _ in range(3):
        for leaf in case.leaves():
            leaf.grad = None
        plain = case()
        torch.autograd.backward(plain, d_results)
        grads = [leaf.grad for leaf in case.leaves()]
        for leaf in case.leaves():
            leaf.grad = None
        results = checkpoint(lambda *_: case(), *case.inputs, use_reentrant=use_reentrant)
        torch.autograd.backward(results, d_results)
        assert all(map(torch.equal, [leaf.grad for leaf in case.leaves()], grads))


def test_saved_tensors_are_given_to_hooks(replays):
    case = Case("video")
    expected = case.expected()
    case.gradients()
    replays.clear()
    with torch.autograd.graph.save_on_cpu():
        assert equal(case.gradients(), expected)
    assert not replays


def test_hooks_of_tensors_run():
    case = Case("both")
    _, expected = case.expected()
    case.gradients()
    for leaf in case.leaves():
        leaf.register_hook(lambda d: 2 * d)
    _, found = case.gradients()
    assert all(torch.equal(2 * x, y) for x, y in zip(expected, found, strict=True))


def test_gradients_from_an_expanded_tensor():
    case = Case("audio")
    case.gradients()
    found = torch.autograd.grad(case()[0].sum(), case.leaves())
    with by_the_functions():
        expected = torch.autograd.grad(case()[0].sum(), case.leaves())
    assert all(map(torch.equal, found, expected))


def test_an_input_with_gaps_is_left_to_the_function(replays):
    block = fill(SelfAttention(32, num_heads=2))
    wide = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for _ in range(3):
        found = torch.autograd.grad(block(wide[..., :32]).square().sum(), wide)[0]
    with by_the_functions():
        expected = torch.autograd.grad(block(wide[..., :32]).square().sum(), wide)[0]
    assert not replays and torch.equal(found, expected)


def test_threads_at_once():
    cases = [Case("video"), Case("video"), Case("both")]
    expected, wrong = [case.expected() for case in cases], []

    def run(at):
        for _ in range(5):
            if not equal(cases[at].gradients(), expected[at]):
                wrong.append(at)

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def both_ways(function):
    """function() twice in replays, as it is expected, and by the functions."""
    function()
    found = function()
    with by_the_functions():
        return found, function()


def test_hooks_of_parameters_run_as_by_the_functions_where_one_result_has_a_loss():
    case = Case("both")
    seen = []
    for name, parameter in case.module.named_parameters():
        parameter.register_hook(lambda d, name=name: seen.append(name) or d.clamp(-1, 1))
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(f"{name} accumulated"))

    def step():
        seen.clear()
        case()[0].square().mean().backward()
        return set(seen)

    found, expected = both_ways(step)
    assert found == expected and len(expected) == 20


@pytest.mark.parametrize("layer", ("video_norm", "audio_qkv", "video_out", "audio_out"))
def test_results_want_gradients_as_those_of_the_functions(layer):
    case = Case("both")
    for x in (*case.inputs, *case.module.parameters()):
        x.requires_grad_(False)
    getattr(case.module, layer).requires_grad_(True)
    found, expected = both_ways(lambda: [x.requires_grad for x in case()])
    assert found == expected and any(expected)


@every_block
@pytest.mark.parametrize("kind", ("negative view", "zeros", "batched"))
def test_gradients_that_are_no_plain_memory(name, kind):
    case = Case(name)
    d_results = [torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) for x in case()]
    if kind == "negative view":
        d_results = list(map(torch._neg_view, d_results))
    if kind == "zeros":
        d_results = [torch._efficientzerotensor(d.shape) for d in d_results]

    def gradients():
        leaves = case.leaves()
        results = case()
        if kind != "batched":
            return torch.autograd.grad(results, leaves, d_results)
        batches = [torch.stack([d, 2 * d]) for d in d_results]
        return torch.func.vmap(lambda *d: torch.autograd.grad(results, leaves, d))(*batches)

    found, expected = both_ways(gradients)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("size", (0, 64))
def test_gradients_whose_memory_was_freed_are_refused(size):
    case = Case()
    case.gradients()
    d = torch.randn(case.inputs[0].shape)
    d.untyped_storage().resize_(size)
    with pytest.raises(ValueError, match="freed or cut short"):
        torch.autograd.grad(case(), case.leaves(), d)


def test_modes_around_backward_alone_see_every_op():
    case = Case("video")

    def flops():
        out = case()[0].sum()
        with FlopCounterMode(display=False) as counter:
            out.backward()
        return counter.get_total_flops()

    found, expected = both_ways(flops)
    assert found == expected > 0


@pytest.mark.filterwarnings("ignore")
def test_under_compiled_autograd(fresh_dynamo):
    case = Case("video")
    expected = case.expected()
    case.gradients()
    results = torch.compiler.disable(case)
    d = torch.randn(expected[0][0].shape, generator=torch.Generator().manual_seed(2))

    @torch.compile(backend="eager")
    def step():
        results()[0].backward(d)

    for _ in range(4):
        for leaf in case.leaves():
            leaf.grad = None
        with torch._dynamo.config.patch(compiled_autograd=True):
            step()
        assert all(torch.equal(leaf.grad, x) for leaf, x in zip(case.leaves(), expected[1], strict=True))


class Ops:
    """A random function of tokens, a chain with residuals, of all that a plan can hold."""

    def __init__(self, seed):
        choose = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.channels = choose.choice((16, 32, 48))
        self.batch, self.length = choose.choice((1, 2)), choose.choice((8, 16))

        def parameter(*shape):
            return (0.3 * torch.randn(*shape, generator=generator)).requires_grad_()

        c = self.channels
        self.x, self.film = parameter(self.batch, self.length, c), parameter(self.batch, 2 * c)
        self.steps, self.tensors = [], [self.x, self.film]
        film_at = choose.randrange(5)  # used once: its gradient is no sum
        for at in range(choose.randint(2, 5)):
            kind = choose.choice(("conv", "conv", "norm", "attention"))
            source = choose.randrange(at + 1)
            residual = choose.randrange(at + 1) if kind == "conv" and choose.random() < 0.6 else None
            taps = choose.choice((1, 3))
            own = {
                "conv": lambda taps=taps: [parameter(c, c, taps), parameter(c), parameter(c), parameter(c)],
                "norm": lambda: [parameter(c), parameter(c)],
                "attention": lambda: [parameter(3 * c, c, 1)],
            }[kind]()
            self.steps.append((kind, source, residual, own, at == film_at))
            self.tensors += own
        self.heads = [parameter(c, c, 1) for _ in range(len(self.steps) + 1)]
        self.tensors += self.heads

    def __call__(self):
        values, used = [self.x], {0}
        for kind, source, residual, own, has_film in self.steps:
            x, scale_shift = values[source], self.film.chunk(2, -1)
            if kind == "conv":
                options = {"film": scale_shift, "activation": "silu"} if has_film else {}
                out = mmattn.dilated_conv1d(
                    x,
                    own[0],
                    own[1],
                    norm=(own[2], own[3], 8),
                    residual=None if residual is None else values[residual],
                    **options,
                )
            elif kind == "norm":
                out = mmattn.group_norm(x, *own, 8)
            else:
                qkv = mmattn.dilated_conv1d(x, own[0])
                q, k, v = qkv.unflatten(-1, (3, 2, -1)).unbind(2)
                out = mmattn.self_attention(q, k, v).flatten(2)
            used |= {source, residual}
            values.append(out)
        return [mmattn.dilated_conv1d(x, self.heads[at]) for at, x in enumerate(values) if at not in used]


@pytest.mark.parametrize("seed", range(60))
def test_gradients_follow_from_any_chain_of_calls(seed):
    from mmattn_kernels.cpu.plan import Plan, Recorder

    ops = Ops(seed)
    with Recorder() as recorder:
        results = ops()
    d_results = [torch.randn(x.shape, generator=torch.Generator().manual_seed(3)) for x in results]
    expected = torch.autograd.grad(results, ops.tensors, d_results, allow_unused=True)
    plan = Plan(recorder, ops.tensors, results)
    _, between = plan.run(ops.tensors)
    gradients = plan.gradients((True,) * len(ops.tensors), (True,) * len(results))
    found = gradients.run([ops.tensors[at] for at in gradients.reads], between, d_results)
    for at, share in zip(gradients.repeats, found[len(ops.tensors) :], strict=True):
        found[at] = found[at] + share
    for x, y in zip(found[: len(ops.tensors)], expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def gradients_of_plan(function, tensors):
    """(those of the plan of a function, those of its graph)."""
    from mmattn_kernels.cpu.plan import Plan, Recorder

    with Recorder() as recorder:
        results = function()
    d_results = [torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x.dtype) for x in results]
    expected = torch.autograd.grad(results, tensors, d_results)
    plan = Plan(recorder, tensors, results)
    made, between = plan.run(tensors)
    gradients = plan.gradients((True,) * len(tensors), (True,) * len(results))
    read = [tensors[at] for at in gradients.reads] + [made[at] for at in gradients.reads_of_results]
    found = gradients.run(read, between, d_results)
    for at, share in zip(gradients.repeats, found[len(tensors) :], strict=True):
        found[at] = found[at] + share
    return found[: len(tensors)], expected


def test_a_result_that_is_read_by_other_calls():
    x, *weights = (torch.randn(shape).requires_grad_() for shape in ((1, 8, 16), (16, 16, 1), (16, 16, 3), (16, 16, 1)))

    def function():
        h = mmattn.dilated_conv1d(x, weights[0])
        y = mmattn.dilated_conv1d(h, weights[1], activation="silu")
        return h, y, mmattn.dilated_conv1d(y, weights[2], residual=h)

    found, expected = gradients_of_plan(function, (x, *weights))
    torch.testing.assert_close(found, list(expected))


@pytest.mark.parametrize("film", (False, True))
def test_a_parameter_of_norms_that_is_used_twice(film):
    x, weight, bias, scale_shift = (torch.randn(shape).requires_grad_() for shape in ((2, 8, 16), 16, 16, (2, 32)))
    options = dict(zip(("scale", "shift"), scale_shift.chunk(2, -1), strict=True)) if film else {}

    def function():
        return (
            mmattn.group_norm(
                mmattn.group_norm(x, weight, bias, 4, **options), weight, bias, 4, activation="silu", **options
            ),
        )

    found, expected = gradients_of_plan(function, (x, weight, bias, *((scale_shift,) if film else ())))
    torch.testing.assert_close(found, list(expected))


def test_a_weight_that_is_used_twice_has_no_plan_of_gradients():
    x, weight = (torch.randn(shape).requires_grad_() for shape in ((1, 8, 16), (16, 16, 1)))
    with pytest.raises(ValueError, match="share memory"):
        gradients_of_plan(lambda: (mmattn.dilated_conv1d(mmattn.dilated_conv1d(x, weight), weight),), (x, weight))


RESAMPLINGS = {
    "pooled": lambda x: blocks.pool_frames(x.view(2, 4, 4, 6, 32)).flatten(1, 3),
    "repeated": lambda x: blocks.repeat_frames(x.view(2, 4, 4, 6, 32)).flatten(1, 3),
    "audio pooled": lambda x: AudioBlock._pool(None, x),
    "audio repeated": lambda x: AudioBlock._repeat(None, x),
}


@pytest.mark.parametrize("name", RESAMPLINGS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_of_what_torch_computes_between_the_ops(name, dtype):
    generator = torch.Generator().manual_seed(4)
    shapes = (2, 96, 32), (32, 32, 1), (32, 32, 3), (32, 64, 1), (32, 32, 1)
    x, *weights = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)

    def function():
        h = mmattn.dilated_conv1d(x, weights[0])
        one, other = (RESAMPLINGS[name](y) for y in (h, mmattn.dilated_conv1d(h, weights[1])))
        joined = mmattn.dilated_conv1d(blocks.concatenate(one, other), weights[2])
        return mmattn.dilated_conv1d(joined, weights[3], residual=one), h

    found, expected = gradients_of_plan(function, (x, *weights))
    assert all(map(torch.equal, found, expected))


class NetworkCase:
    """A network in training, the clip that it is given, and gradients of what it makes of it."""

    def __init__(self, dtype=torch.float32, batch=1, **options):
        generator = torch.Generator().manual_seed(1)
        small = SMALL_UNET | {"audio_attention_resolutions": (2,), "middle_cross_attention": True} | options
        self.network = fill(CoupledUNet(**small)).to(dtype).train()
        shapes = (batch, 4, 3, 8, 8), (batch, 1, 64)
        self.clip = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]

    def call(self, shift=1):
        """A module, and the arguments and options of a call."""
        return self.network, (*self.clip, 500), {"shifts": [shift] * len(self.network.shift_ranges())}

    def __call__(self, **options):
        module, inputs, options = self.call(**options)
        return module(*inputs, **options)

    def gradients(self, which=(0, 1), shift=1):
        streams = self(shift=shift)
        results = [streams[at] for at in which]
        generator = torch.Generator().manual_seed(2)
        d_results = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
        leaves = [x for x in (*self.clip, *self.network.parameters()) if x.requires_grad]
        found = torch.autograd.grad(results, leaves, d_results, allow_unused=True)
        return [x.detach() for x in results], found

    def expected(self, **options):
        with by_the_functions():
            return self.gradients(**options)


def block_call():
    """The same of a block."""
    return fill(SelfAttention(64, 2)), (torch.randn(1, 16, 64),), {}


CROSSES = {
    "at the end": {"cross_attention_resolutions": (1, 2), "cross_attention_windows": (1, 2)},
    "before the end": {},
}


@pytest.mark.parametrize("crosses", CROSSES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("batch", (1, 3))
def test_gradients_of_a_network_are_those_of_its_functions(crosses, dtype, batch, replays):
    case = NetworkCase(dtype, batch, **CROSSES[crosses])
    expected = case.expected()
    assert not replays and equal(case.gradients(), expected)
    replays.clear()
    assert equal(case.gradients(), expected)
    # All before the last attention across the streams, that attention, and what is behind it of each stream.
    assert len(replays) == (2 if crosses == "at the end" else 4)
    assert equal(case.gradients(shift=0), case.expected(shift=0)) and not equal(case.expected(shift=0), expected)


@pytest.mark.parametrize("crosses", CROSSES)
@pytest.mark.parametrize("which", ((0,), (1,)), ids=("video", "audio"))
def test_of_a_network_where_one_result_has_no_gradient(crosses, which):
    """No hook of a parameter runs that would not have."""
    case = NetworkCase(**CROSSES[crosses])
    expected = case.expected(which=which)
    case.gradients()
    assert equal(case.gradients(which=which), expected) and equal(case.gradients(which=which), expected)
    called = []
    for name, parameter in case.network.named_parameters():
        parameter.register_hook(lambda gradient, name=name: called.append((name, gradient.shape)))
    results = case()
    results[which[0]].sum().backward()
    assert len(called) == sum(gradient is not None for gradient in expected[1][2:])


def frozen_encoder(network):
    network.encoder.requires_grad_(False)


def trained_end(network):
    network.requires_grad_(False)
    network.decoder[-1].requires_grad_(True)


def trained_biases(network):
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))


def trained_cross_attention(network):
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".cross." in name)


@pytest.mark.parametrize("of_clip", (False, True), ids=("", "of the clip"))
@pytest.mark.parametrize(
    "choose", (frozen_encoder, trained_end, trained_biases, trained_cross_attention), ids=lambda f: f.__name__
)
def test_of_a_part_of_the_parameters(choose, of_clip):
    case = NetworkCase()
    for x in case.clip:
        x.requires_grad_(of_clip)
    choose(case.network)
    expected = case.expected()
    assert equal(case.gradients(), expected) and equal(case.gradients(), expected)


def test_a_network_that_drops_values_draws_them_as_its_functions_do():
    case = NetworkCase(dropout=0.3)
    torch.manual_seed(3)
    expected = case.expected()
    for _ in range(2):
        torch.manual_seed(3)
        assert equal(case.gradients(), expected)


def test_a_network_whose_weights_are_trained():
    """Each step packs other weights than the one before."""
    case, other = NetworkCase(), NetworkCase()
    for one, manager in ((case, contextlib.nullcontext), (other, by_the_functions)):
        optimizer = torch.optim.Adam(one.network.parameters(), lr=1e-3)
        with manager():
            for step in range(4):
                results = one.network(*one.clip, 100 * step, shifts=[1] * len(one.network.shift_ranges()))
                optimizer.zero_grad()
                sum(x.square().mean() for x in results).backward()
                optimizer.step()
    assert all(map(torch.equal, case.network.parameters(), other.network.parameters()))


def test_a_network_is_differentiated_twice_by_its_functions_alone():
    case = NetworkCase()
    case.gradients()
    results = case()
    gradients = torch.autograd.grad(results[0].sum(), case.clip[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(gradients[0].sum(), case.clip[0])


def test_memory_between_the_gradients_of_a_network_is_used_again(replays):
    case = NetworkCase()
    case.gradients(), case.gradients()
    largest = max(replays, key=lambda gradients: len(gradients.made))
    plan = next(
        plan for calls in _replay._plans.values() for _, plan in calls if plan and largest in plan._gradients.values()
    )
    assert 0 < largest._bytes < plan.bytes_between / 2


@pytest.mark.parametrize("batch", (1, 2))
def test_of_one_frame_and_one_position_of_sound(batch):
    """Its repetition is a view, whose elements share memory."""
    case = NetworkCase(batch=batch, cross_attention_windows=(1,), middle_cross_attention=False)
    generator = torch.Generator().manual_seed(5)
    levels = len(case.network.config["channel_mult"])
    shapes = (batch, 1, 3, 4, 4), (batch, 1, 4 ** (levels - 1))
    case.clip = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    expected = case.expected(shift=0)
    for _ in range(2):
        for x, y in zip(case.gradients(shift=0)[1], expected[1], strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("of_network", (False, True), ids=("block", "network"))
def test_a_mode_around_backward_of_parameters_that_are_others_by_now(of_network):
    """As of torch.func.functional_call; without a mode, forward is not computed again."""
    module, inputs, options = NetworkCase().call() if of_network else block_call()
    parameters = {name: (2 * p.detach()).requires_grad_() for name, p in module.named_parameters()}

    def gradients():
        out = torch.func.functional_call(module, parameters, inputs, options)
        loss = sum(x.square().sum() for x in (out if isinstance(out, tuple) else (out,)))
        with FlopCounterMode(display=False):
            return torch.autograd.grad(loss, list(parameters.values()))

    with by_the_functions():
        expected = gradients()
    # Of a network that is computed again within rounding: gradients of biases in front of norms are nothing else.
    limit = 1e-5 * max(y.abs().max() for y in expected) if of_network else 0
    for _ in range(3):
        for x, y in zip(gradients(), expected, strict=True):
            assert (x - y).abs().max() <= limit


def test_a_mode_around_backward_of_parameters_that_were_written_to():
    module, x = fill(SelfAttention(64, 2)), torch.randn(1, 16, 64)
    module(x).sum().backward()
    out = module(x)
    with torch.no_grad():
        module.qkv.bias.add_(1)
    with FlopCounterMode(display=False), pytest.raises(RuntimeError, match="modified in place"):
        out.sum().backward()


def test_where_no_gradient_is_given():
    """As DDP gives none to what has no part in a loss."""

    class Sink(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *x):
            ctx.set_materialize_grads(False)
            return x

        @staticmethod
        def backward(ctx, *d):
            return d

    case = NetworkCase()

    def without():
        case.network.zero_grad()
        video, _ = Sink.apply(*case())
        video.sum().backward()
        return [name for name, p in case.network.named_parameters() if p.grad is None]

    with by_the_functions():
        expected = without()
    assert expected and without() == expected and without() == expected


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.inner = module

    def forward(self, *args, **options):
        return self.inner(*args, **options)


def wrap_a_block(network):
    network.encoder[0].block = Wrapper(network.encoder[0].block)


def wrap_a_stage(network):
    network.middle[0] = Wrapper(network.middle[0])


def wrap_a_stream(network):
    network.decoder[0].block.video = Wrapper(network.decoder[0].block.video)


def shorten_the_decoder(network):
    network.decoder = network.decoder[:-1]


@pytest.mark.parametrize(
    "change", (wrap_a_block, wrap_a_stage, wrap_a_stream, shorten_the_decoder), ids=lambda f: f.__name__
)
def test_whatever_is_done_to_a_network_in_training_takes_effect(change):
    case = NetworkCase(channel_mult=(1, 1)) if change is shorten_the_decoder else NetworkCase()
    case.gradients(), case.gradients()
    change(case.network)
    expected = case.expected()
    assert equal(case.gradients(), expected) and equal(case.gradients(), expected)


def gradients_under_a_mode(module, inputs, options, change=None, mode=lambda: FlopCounterMode(display=False)):
    out = module(*inputs, **options)
    results = out if isinstance(out, tuple) else (out,)
    if change is not None:
        change(module)
    with mode():
        return torch.autograd.grad(sum(x.square().sum() for x in results), list(module.parameters()), allow_unused=True)


def test_modes_around_backward_in_threads_leave_parameters_alone():
    case = NetworkCase()
    _, inputs, options = case.call()
    expected = [gradients_under_a_mode(case.network, inputs, options) for _ in range(2)][-1]
    wrong, switching = [], sys.getswitchinterval()

    def run():
        for _ in range(3):
            found = gradients_under_a_mode(case.network, inputs, options)
            wrong.extend(1 for x, y in zip(found, expected, strict=True) if (x is None) != (y is None))

    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert all(type(p) is nn.Parameter for p in case.network.parameters())
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switching)
    assert not wrong


def set_eps(module):
    next(x for x in getattr(module, "encoder", module).modules() if isinstance(x, nn.GroupNorm)).eps = 0.5


def drop_a_bias(module):
    next(x for x in getattr(module, "encoder", module).modules() if isinstance(x, nn.Conv1d)).bias = None


@pytest.mark.parametrize("of_network", (False, True), ids=("block", "network"))
@pytest.mark.parametrize("change", (set_eps, drop_a_bias), ids=lambda f: f.__name__)
def test_a_mode_around_backward_of_modules_that_were_changed(of_network, change):
    module, inputs, options = NetworkCase().call() if of_network else block_call()
    for _ in range(2):
        gradients_under_a_mode(module, inputs, options)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        gradients_under_a_mode(module, inputs, options, change)


def test_a_mode_around_backward_of_a_network_that_is_trained_by_then():
    case = NetworkCase(dropout=0.5)
    _, inputs, options = case.call()
    for _ in range(2):
        gradients_under_a_mode(case.network.eval(), inputs, options)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        gradients_under_a_mode(case.network, inputs, options, lambda network: network.train())


def test_a_mode_and_autocast_around_backward():
    call = NetworkCase().call()

    @contextlib.contextmanager
    def mode():
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.profiler.profile():
            yield

    def gradients():
        return gradients_under_a_mode(*call, mode=mode)

    with by_the_functions():
        expected = gradients()
    limit = 1e-5 * max(y.abs().max() for y in expected)
    for _ in range(3):
        assert all((x - y).abs().max() <= limit for x, y in zip(gradients(), expected, strict=True))


@pytest.mark.parametrize("of_network", (False, True), ids=("block", "network"))
def test_batches_of_gradients_by_the_vmap_of_autograd(of_network):
    module, inputs, options = NetworkCase().call() if of_network else block_call()
    leaves = list(module.parameters())
    for _ in range(3):
        out = module(*inputs, **options)
        out = out if isinstance(out, tuple) else (out,)
        d_out = [torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(6)) for x in out]
        found = torch.autograd.grad(out, leaves, d_out, is_grads_batched=True, retain_graph=True)
        for at in range(2):
            expected = torch.autograd.grad(out, leaves, [d[at] for d in d_out], retain_graph=True)
            limit = 1e-5 * max(y.abs().max() for y in expected)
            assert all((x[at] - y).abs().max() <= limit for x, y in zip(found, expected, strict=True))
