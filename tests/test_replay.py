# SPDX-License-Identifier: MIT
"""Parts of a network that the extension runs by one call: bit for bit what their functions compute."""

import gc
import threading
import warnings
import weakref
from collections import UserList

import numpy as np
import pytest
import torch
from helpers import SMALL_UNET, fill, needs_extension
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import mmattn
from mmattn import RandomShiftAttention, _replay
from mmdiffusion import CoupledUNet
from mmdiffusion.model.blocks import AudioBlock, SelfAttention, VideoBlock

pytestmark = needs_extension


@pytest.fixture(autouse=True)
def _at_first_sight(monkeypatch):
    monkeypatch.setattr(_replay, "records_at_second_sight", False)


class Case:
    """A network without gradients, whose parts have been replayed, and its inputs."""

    def __init__(self, name="unet", batch=1, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)

        def random(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        if name == "unet":
            options = SMALL_UNET | {"audio_attention_resolutions": (2,), "middle_cross_attention": True}
            self.module = fill(CoupledUNet(**options)).eval().to(dtype)
            self.inputs = random(batch, 4, 3, 8, 8), random(batch, 1, 64)
        else:
            self.module = fill(RandomShiftAttention(64, num_heads=2, window=2)).to(dtype)
            self.inputs = random(batch, 4, 3, 3, 64).permute(0, 1, 4, 2, 3), random(batch, 27, 64).transpose(1, 2)

    def options(self, shift=1):
        is_unet = isinstance(self.module, CoupledUNet)
        shifts = [shift] * len(self.module.shift_ranges()) if is_unet else []
        return {"timesteps": 500, "shifts": shifts} if is_unet else {"shift": shift}

    def __call__(self, shift=1):
        with torch.no_grad():
            return self.module(*self.inputs, **self.options(shift))

    def expected(self, **options):
        """What the functions compute."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_replay, "LARGEST", 0)
            return self(**options)


def equal(found, expected):
    return all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(found, expected, strict=True))


@pytest.fixture
def replays(monkeypatch):
    """The parts that were replayed since the list was cleared, in their order."""
    from mmattn_kernels.cpu.plan import Plan

    found = []
    run = Plan.run

    def counted(plan, tensors, shifts=()):
        found.append(plan)
        return run(plan, tensors, shifts)

    monkeypatch.setattr(Plan, "run", counted)
    return found


every_module = pytest.mark.parametrize("name", ("unet", "RandomShiftAttention"))


@every_module
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("batch", (1, 3))
def test_replays_are_what_was_noted(name, batch, dtype, replays):
    case = Case(name, batch, dtype)
    expected = case.expected()
    assert equal(case(), expected)
    replays.clear()
    assert equal(case(), expected) and len(replays) == 1


def test_parts_of_a_network_that_is_not_one_call_are_replayed(replays):
    case = Case()
    expected = case.expected()
    case.module.middle[0].register_forward_hook(lambda *_: None)
    assert equal(case(), expected)
    replays.clear()
    assert equal(case(), expected)
    kinds = SelfAttention, RandomShiftAttention, AudioBlock, VideoBlock
    parts = [x for x in case.module.modules() if isinstance(x, kinds) and getattr(x, "resampling", None) != "down"]
    assert len(replays) == len(parts)


def test_a_network_of_added_embeddings_is_one_call(replays):
    case = Case()
    case.module = fill(CoupledUNet(**SMALL_UNET, use_scale_shift_norm=False)).eval()
    case.options = lambda _shift: {"timesteps": 500, "shifts": [1] * len(case.module.shift_ranges())}
    expected = case.expected()
    assert equal(case(), expected)
    replays.clear()
    assert equal(case(), expected) and len(replays) == 1


def test_a_network_is_noted_at_the_second_sight_of_a_shape(monkeypatch, replays):
    """A plan would cost more than it saves where no shape comes again; the first call replays no parts either."""
    monkeypatch.setattr(_replay, "records_at_second_sight", True)
    monkeypatch.setattr(_replay, "_plans", {})
    case = Case()
    expected = case.expected()
    for calls in range(4):
        assert equal(case(), expected)
        assert len(replays) == max(0, calls - 1)
    assert len(_replay._plans) == 1


def test_shifts_of_a_network_share_its_plan(replays):
    case = Case()
    ranges = case.module.shift_ranges()
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        shifts = [int(torch.randint(largest + 1, (1,), generator=generator)) for largest in ranges]
        case.options = lambda _shift, shifts=shifts: {"timesteps": 500, "shifts": shifts}
        assert equal(case(), case.expected())
    assert len(replays) >= 5 and len({id(plan) for plan in replays}) == 1


def test_memory_between_the_calls_of_a_network_is_used_again(replays):
    case = Case()
    case(), case()
    regions = [region for region in replays[0].regions if region.block == replays[0].between]
    assert 0 < replays[0].bytes_between < sum(region.size for region in regions) / 8


def test_a_network_that_has_replayed_is_freed():
    case = Case()
    case(), case()
    network, weight = weakref.ref(case.module), weakref.ref(case.module.encoder[0].block.video.spatial.weight)
    del case
    gc.collect()
    assert network() is None and weight() is None


def test_a_network_that_one_of_its_parameters_leads_back_to_is_freed():
    class Trainer:
        def __init__(self):
            self.case = Case()
            for parameter in self.case.module.parameters():
                parameter.register_hook(self.clip)

        def clip(self, gradient):
            return gradient.clamp(-1, 1)

    trainer = Trainer()
    trainer.case(), trainer.case()
    trainer.case.module.encoder[0].register_state_dict_post_hook(lambda *_, owner=trainer: None)
    network = weakref.ref(trainer.case.module)
    trainer.case()
    del trainer
    gc.collect()
    assert network() is None


def test_a_network_of_long_sound_is_called_by_its_parts(replays):
    """All that lies between its calls would be kept for backward."""
    case = Case()
    frames, length = 4, 64 * 256
    case.inputs = torch.randn(1, frames, 3, 8, 8), torch.randn(1, 1, length)
    case(), case()
    assert 32 * length * 4 > _replay.LARGEST and replays and max(len(plan.calls) for plan in replays) < 20


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(_replay, "_plans", {})
    monkeypatch.setattr(_replay, "_NOTED", 300)
    case = Case()
    for frames in range(3, 9):
        case.inputs = torch.randn(1, frames, 3, 8, 8), torch.randn(1, 1, 64)
        assert equal(case(), case.expected())
    assert sum(len(plan.calls) for calls in _replay._plans.values() for _, plan in calls if plan) < 600


def hook_a_block(network):
    network.decoder[0].block.register_forward_hook(lambda _module, _args, out: tuple(2 * x for x in out))


def hook_a_stage_first(network):
    network.encoder[1].register_forward_pre_hook(lambda _module, args: (args[0] + 1, *args[1:]))


def put_it_into_itself(network):
    network.encoder[0].block.audio.add_module("owner", network.encoder)
    network.encoder[0].block.audio.conv1.weight.data.mul_(2)


def narrow_a_window(network):
    cross = next(stage.cross for stage in network.encoder if stage.cross is not None and stage.cross.window > 1)
    cross.window = 1


def double_heads(network):
    network.middle[0].cross.num_heads *= 2


def swap_stages(network):
    network.middle[0], network.middle[1] = network.middle[1], network.middle[0]


def drop_a_stage(network):
    network.middle = network.middle[:1]


def drop_cross_attention(network):
    next(stage for stage in network.encoder if stage.cross is not None).cross = None


def add_a_stage(network):
    network.middle.append(network.middle[1])


def replace_a_forward(network):
    forward = network.encoder[0].block.audio.forward
    network.encoder[0].block.audio.forward = lambda *args, **options: 2 * forward(*args, **options)


def of_a_subclass(network):
    class Louder(AudioBlock):
        def forward(self, *args, **options):
            return 2 * super().forward(*args, **options)

    network.encoder[0].block.audio.__class__ = Louder


@pytest.mark.parametrize(
    "change",
    (
        hook_a_block,
        hook_a_stage_first,
        put_it_into_itself,
        narrow_a_window,
        double_heads,
        swap_stages,
        drop_a_stage,
        drop_cross_attention,
        add_a_stage,
        replace_a_forward,
        of_a_subclass,
    ),
    ids=lambda change: change.__name__,
)
def test_whatever_is_done_to_a_network_takes_effect(change):
    case = Case()
    before = [case() for _ in range(2)][-1]
    change(case.module)
    options = {"timesteps": 500, "shifts": [1] * len(case.module.shift_ranges())}
    case.options = lambda _shift: options
    after = case.expected()
    assert not equal(after, before) and equal(case(), after) and equal(case(), after)


def test_settings_of_other_types_take_effect():
    case = Case()
    norms = [module for module in case.module.modules() if isinstance(module, nn.GroupNorm)]
    for eps in (1e-5, 0.5):
        for norm in norms:
            norm.eps = np.float64(eps)
        assert equal(case(), case.expected()) and equal(case(), case.expected())


def test_what_is_no_network_is_refused():
    from mmattn_kernels import cpu

    extension, within = cpu.extension(), nn.Module()
    within._modules["itself"] = within
    for roots, error in (([5], (AttributeError, TypeError)), ([within], ValueError)):
        with pytest.raises(error):
            extension.Modules(roots)
    plan = extension.Plan([(1 << 20, 64, 0, 0)])
    plan.sum((1 << 20, (0, 0, 0, 0)), [], (1, 1, 1, 1, 16), 1.0, False, 1)
    with pytest.raises(ValueError, match="0 blocks; expected 1"):
        plan.run([])


@pytest.mark.parametrize("kind", (list, UserList))
def test_a_list_of_a_layer_that_is_written_to_takes_effect(kind):
    case = Case()
    layer = case.module.encoder[0].block.audio.conv1
    layer.dilation, layer.padding = kind([1]), kind([1])
    before = [case() for _ in range(2)][-1]
    layer.dilation[0] = layer.padding[0] = 2
    assert not equal(case(), before) and equal(case(), case.expected())


@every_module
def test_inputs_and_earlier_results_are_left_alone(name):
    case = Case(name)
    before = [x.clone() for x in case.inputs]
    first = case()
    kept = [x.clone() for x in first]
    case()
    case(shift=0)
    assert equal(case.inputs, [x.as_strided(x.size(), y.stride()) for x, y in zip(before, case.inputs, strict=True)])
    assert equal(first, kept)


@every_module
@pytest.mark.parametrize("kind", (int, torch.tensor), ids=("int", "tensor"))
def test_each_shift_is_its_own(name, kind):
    case = Case(name)
    found = [case(shift=kind(shift)) for _ in range(2) for shift in (0, 1, 2)]
    expected = [case.expected(shift=shift) for shift in (0, 1, 2)]
    assert all(map(equal, found, expected * 2)) and not equal(expected[0], expected[1])
    with pytest.raises(ValueError, match="3"):
        case(shift=kind(3))


def layer(module, kind):
    return next(x for x in module.modules() if type(x) is kind)


def replace_parameter(module):
    linear = layer(module, nn.Linear)
    linear.weight = nn.Parameter(linear.weight.detach().flip(0))


def drop_bias(module):
    layer(module, nn.Linear).bias = None


def set_eps(module):
    layer(module, nn.GroupNorm).eps = 0.5


def set_groups(module):
    layer(module, nn.GroupNorm).num_groups = 16


def write_data(module):
    for parameter in module.parameters():
        parameter.data.mul_(1.25)


def write_memory(module):
    layer(module, nn.Linear).weight.detach().numpy()[3, 5] += 2


def exchange_data(module):
    for parameter in module.parameters():
        parameter.data = parameter.data.flip(0)


def transpose_memory(module):
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.transpose(0, 1).contiguous().transpose(0, 1)


def step(module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def load(module):
    module.load_state_dict({key: 0.5 * value for key, value in module.state_dict().items()})


def assign(module):
    module.load_state_dict({key: 0.5 * value for key, value in module.state_dict().items()}, assign=True)


def halve_parameters_of_norms(module):
    for norm in (x for x in module.modules() if isinstance(x, nn.GroupNorm)):
        norm.bfloat16()


def hook(module):
    layer(module, nn.GroupNorm).register_forward_hook(lambda _module, _args, out: 2 * out)


def hooks_in_a_new_dict(module):
    found = layer(module, nn.Linear)
    found._forward_hooks = type(found._forward_hooks)()
    found.register_forward_hook(lambda _module, _args, out: 2 * out)


def own_forward(module):
    found = layer(module, nn.Linear)
    forward = found.forward
    found.forward = lambda x: forward(x) + 1


def own_class(module):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer(module, nn.Linear).__class__ = Doubled


def pruned(module):
    prune.l1_unstructured(layer(module, nn.Linear), "weight", amount=0.5)


def parametrized(module):
    parametrizations.weight_norm(layer(module, nn.Linear)).parametrizations.weight.original0.data.mul_(2)


def replace_layer(module):
    found = layer(module, nn.GroupNorm)
    path = next(path for path, x in module.named_modules() if x is found)
    module.set_submodule(path, nn.Identity())


def tie(module):
    one, other = [x for x in module.modules() if type(x) is nn.GroupNorm][:2]
    other.weight = one.weight


CHANGES = (
    replace_parameter,
    drop_bias,
    set_eps,
    set_groups,
    write_data,
    write_memory,
    exchange_data,
    transpose_memory,
    step,
    load,
    assign,
    halve_parameters_of_norms,
    hook,
    hooks_in_a_new_dict,
    own_forward,
    own_class,
    pruned,
    parametrized,
    replace_layer,
    tie,
)


@every_module
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_is_done_to_a_layer_takes_effect(name, change):
    case = Case(name)
    before = [case() for _ in range(2)][-1]
    change(case.module)
    after = case.expected()
    assert equal(case(), after) and equal(case(), after)
    assert not equal(after, before) or change in (transpose_memory, hooks_in_a_new_dict, halve_parameters_of_norms)


@every_module
def test_hooks_of_all_modules_run(name):
    case = Case(name)
    case()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _args, out: 2 * out if isinstance(module, nn.GroupNorm) else None
    )
    try:
        assert equal(case(), case.expected())
    finally:
        handle.remove()


def test_settings_of_blocks_take_effect():
    case = Case()
    case()
    case.module.encoder[0].block.audio.conv1.dilation = case.module.encoder[0].block.audio.conv1.padding = (4,)
    attention = next(x for x in case.module.modules() if isinstance(x, SelfAttention))
    for other in (1, 4):
        attention.num_heads = other
        assert equal(case(), case.expected())


@every_module
def test_modes_of_torch_see_every_op(name):
    case = Case(name)
    case()
    with FlopCounterMode(display=False) as counter:
        case()
    with FlopCounterMode(display=False) as expected:
        case.expected()
    assert counter.get_total_flops() == expected.get_total_flops() > 0
    with torch.autograd.profiler.profile() as profile:
        case()
    assert any("mmattn::conv" in event.name for event in profile.function_events)


@every_module
def test_gradients_and_transforms_are_those_of_the_functions(name):
    case = Case(name)
    case()
    options = case.options()
    out = case.module(*case.inputs, **options)
    assert all(x.requires_grad for x in out) and equal([x.detach() for x in out], case.expected())
    with torch.no_grad():
        stacked = [torch.stack([x, x.flip(-1)]) for x in case.inputs]
        found = torch.func.vmap(lambda *x: case.module(*x, **options))(*stacked)
        parameters = {key: 2 * value for key, value in case.module.named_parameters()}
        doubled = torch.func.functional_call(case.module, parameters, case.inputs, options)
    assert all(torch.allclose(x[0], y, atol=1e-4) for x, y in zip(found, case(), strict=True))
    with torch.no_grad():
        for parameter in case.module.parameters():
            parameter.mul_(2)
    assert equal(doubled, case.expected())


@every_module
def test_under_autocast_and_inference_mode(name):
    case = Case(name)
    case()
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(case(), case.expected())
    with torch.inference_mode():
        found = [case() for _ in range(2)]
    assert all(x.is_inference() for x in found[1]) and equal(found[1], case.expected())


def test_another_instruction_set_and_number_of_threads(instruction_set):
    case = Case()
    case()
    instruction_set("portable")
    portable = case.expected()
    assert equal(case(), portable) and equal(case(), portable)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert equal(case(), case.expected()) and equal(case(), case.expected())
    finally:
        torch.set_num_threads(threads)


def test_the_reference_asked_for_by_the_environment(monkeypatch):
    case = Case("RandomShiftAttention")
    case()
    monkeypatch.setenv("MMATTN_IMPL", "reference")
    assert equal(case(), case.expected()) and equal(case(), case.expected())


@every_module
def test_freed_memory_is_refused(name):
    case = Case(name)
    case()
    layer(case.module, nn.GroupNorm).weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="freed or cut short"):
        case()


def test_many_offsets_of_an_input_end_in_the_function(replays):
    case = Case("RandomShiftAttention")
    wide = torch.randn(40, *case.inputs[0].permute(0, 1, 3, 4, 2).shape)
    for at in range(40):
        case.inputs = wide[at].permute(0, 1, 4, 2, 3), case.inputs[1]
        assert equal(case(), case.expected())
    assert len(max(_replay._plans.values(), key=len)) <= _replay._CALLS_OF_A_KEY


@pytest.mark.parametrize("change", ("a strided bias", "a strided weight"))
def test_temporary_copies_are_not_taken_for_what_is_written_to_their_memory(change, monkeypatch, replays):
    """They live until the plan is made, which finds that it lacks them."""
    from mmattn_kernels.cpu import conv
    from mmattn_kernels.cpu.plan import Plan

    copies, alive = [], []
    readable, pack, make = conv.readable, conv._pack, Plan.__init__

    def watched(function):
        def call(*tensors):
            found = function(*tensors)
            made = [found] if isinstance(found, torch.Tensor) else found
            copies.extend(weakref.ref(x) for x in made if not any(x is t for t in tensors))
            return found

        return call

    def planned(*arguments, **options):
        alive.append(all(copy() is not None for copy in copies))
        make(*arguments, **options)

    monkeypatch.setattr(_replay, "_plans", {})
    monkeypatch.setattr(conv, "readable", watched(readable))
    monkeypatch.setattr(conv, "_pack", watched(pack))
    monkeypatch.setattr(Plan, "__init__", planned)
    case = Case("RandomShiftAttention")
    layer = case.module.video_qkv
    if change == "a strided bias":
        layer.bias = nn.Parameter(layer.bias.data.repeat_interleave(2)[::2])
    else:
        layer.weight = nn.Parameter(layer.weight.data.repeat_interleave(2, 1)[:, ::2])
    first = case()
    assert copies and alive and all(alive)
    assert equal(case(), first) and not any(replays[-1:])


def test_threads_replay_at_once():
    cases = [Case(batch=batch) for batch in (1, 1, 2)]
    for case, scale in zip(cases, (1, 2, 3), strict=True):
        case.module = cases[0].module
        case.inputs = tuple(scale * x for x in case.inputs)
    expected, wrong = [case.expected() for case in cases], []

    def run(at):
        for _ in range(10):
            if not equal(cases[at](), expected[at]):
                wrong.append(at)

    threads = [threading.Thread(target=run, args=(at,)) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_lora_is_called():
    peft = pytest.importorskip("peft")
    case = Case("RandomShiftAttention")
    case()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=3, target_modules=["video_qkv", "audio_out"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, case.module)
    assert equal(case(), case.expected()) and equal(case(), case.expected())


def test_one_tensor_as_both_streams():
    """torch's guards refuse to hold it twice."""
    block = fill(RandomShiftAttention(64, num_heads=2, window=2))
    frames = torch.randn(1, 4, 1, 1, 64)
    audio = frames.view(1, 4, 64)
    with torch.no_grad():
        found = [block(frames.permute(0, 1, 4, 2, 3), audio.transpose(1, 2), shift=0) for _ in range(2)]
        expected = block(frames.permute(0, 1, 4, 2, 3), audio.clone().transpose(1, 2), shift=0)
    assert equal(found[0], found[1]) and equal(found[0], expected)


def test_compiled_in_one_graph(fresh_dynamo):
    case = Case("RandomShiftAttention")
    expected = case()
    case.module = torch.compile(case.module, fullgraph=True, backend="eager")
    assert equal(case(), expected)


def test_a_method_patched_on_a_block_is_called(replays):
    block = fill(SelfAttention(32, num_heads=2)).eval()
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        block(x), block(x)
        assert replays
        replays.clear()
        block._attend = lambda qkv, segments, num_heads: torch.zeros_like(qkv[..., :32])
        assert torch.equal(block(x), x + block.out.bias) and not replays


@pytest.fixture
def audio_block():
    """An AudioBlock that has been recorded, and a function that calls it."""
    block = fill(AudioBlock(64, 64, dilation=1, num_heads=0, resampling=None, dropout=0.0)).eval()
    generator = torch.Generator().manual_seed(0)
    x, embedding = torch.randn(1, 32, 64, generator=generator), torch.randn(1, 128, generator=generator)

    def call():
        with torch.no_grad():
            return block(x, embedding, is_film=True)

    call()
    return block, call


def test_a_method_patched_on_a_class_is_called(audio_block, replays, monkeypatch):
    _, call = audio_block
    before, convolve = call(), AudioBlock._convolve
    assert replays
    replays.clear()
    with monkeypatch.context() as patch:
        patch.setattr(AudioBlock, "_convolve", lambda self, x: convolve(self, x).relu_())
        assert not torch.equal(call(), before) and torch.equal(call(), call()) and not replays
    assert torch.equal(call(), before)


def test_a_method_patched_on_a_class_that_was_not_seen_yet(audio_block, replays, monkeypatch):
    """An op of torch in place leaves a recording no trace."""
    _, call = audio_block
    before, convolve = call(), AudioBlock._convolve
    replays.clear()
    _replay._code_of.cache_clear()
    try:
        monkeypatch.setattr(AudioBlock, "_convolve", lambda self, x: convolve(self, x).relu_())
        assert torch.equal(call(), call()) and not torch.equal(call(), before) and not replays
    finally:
        _replay._code_of.cache_clear()


def test_a_method_of_a_subclass_is_called(audio_block, replays):
    class Twice(AudioBlock):
        is_twice = False

        def _convolve(self, x):
            return super()._convolve(super()._convolve(x) if self.is_twice else x)

    block, call = audio_block
    before = call()
    block.__class__ = Twice
    replays.clear()
    assert torch.equal(call(), before)
    block.is_twice = True
    assert not torch.equal(call(), before) and not replays


def test_an_op_that_is_patched_is_called(replays, monkeypatch):
    block = fill(SelfAttention(32, num_heads=2)).eval()
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = [block(x) for _ in range(2)][-1]
        assert replays
        attend = mmattn.self_attention
        monkeypatch.setattr(mmattn, "self_attention", lambda *tensors, **options: 2 * attend(*tensors, **options))
        assert not torch.equal(block(x), before)


def test_a_weight_in_the_place_of_the_parameter_is_used():
    block = fill(SelfAttention(32, num_heads=2)).eval()
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = [block(x) for _ in range(2)][-1]
        block.qkv.__dict__["weight"] = 2 * block.qkv.weight
        assert not torch.equal(block(x), before)
