# SPDX-License-Identifier: MIT
"""What users of torch do to layers: the modules compute with it, whichever way it is done."""

import copy
import warnings

import pytest
import torch
from helpers import SMALL_UNET, fill
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from mmattn import DilatedConvBlock, RandomShiftAttention
from mmattn.testing import relative_error
from mmdiffusion import CoupledUNet

peft = pytest.importorskip("peft")


def random_shift_attention():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 4, 64, 3, 3, generator=generator), torch.randn(2, 64, 27, generator=generator)
    made = fill(RandomShiftAttention(64, num_heads=2, window=2))
    return made, lambda module, dtype=torch.float32: module(*(x.to(dtype) for x in inputs), shift=1)


def audio_block():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 64, 53, generator=generator), torch.randn(2, 24, generator=generator)
    made = fill(DilatedConvBlock(64, 96, dilation=4, embedding_channels=24))
    return made, lambda module, dtype=torch.float32: (module(*(x.to(dtype) for x in inputs)),)


def unet():
    generator = torch.Generator().manual_seed(1)
    video, audio = torch.randn(1, 4, 3, 8, 8, generator=generator), torch.randn(1, 1, 64, generator=generator)
    made = fill(CoupledUNet(**SMALL_UNET | {"audio_attention_resolutions": (2,)})).eval()
    shifts = [1] * len(made.shift_ranges())
    return made, lambda module, dtype=torch.float32: module(video.to(dtype), audio.to(dtype), 500, shifts=shifts)


MODULES = {"RandomShiftAttention": random_shift_attention, "DilatedConvBlock": audio_block, "CoupledUNet": unet}
all_modules = pytest.mark.parametrize("name", MODULES)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layers_of(module, kinds=LAYERS):
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, kinds)}


def errors(found, expected):
    return [relative_error(x, y) for x, y in zip(found, expected, strict=True)]


def with_lora(module, targets=None, **options):
    """The module under LoRA of every layer or some, with factors that are not zero."""
    targets = list(layers_of(module)) if targets is None else targets
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.inject_adapter_in_model(config, module)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


def lora_layers(module):
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)}


def merged(module):
    """A copy with the adapters' products in the weights, and of the original's structure."""
    made = copy.deepcopy(module)
    for name, layer in lora_layers(made).items():
        layer.merge()
        made.set_submodule(name, layer.base_layer)
    return made


def weight_gradients(module, call):
    module.requires_grad_(True).zero_grad()
    out = call(module)
    sum((x * x).sum() for x in out).backward()
    return {name: p.grad for name, p in module.named_parameters()}


@all_modules
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_lora_of_every_layer(name, dtype):
    """The output is that of the merged weights, and each factor's gradient follows from theirs.

    In fp32 plain torch's own gradients are up to 1.1e-5 off those of fp64 after a whole U-Net, so the two differ there.
    """
    module, call_in = MODULES[name]()
    limit = {torch.float32: 3e-5 if name == "CoupledUNet" else 1e-5, torch.float64: 1e-11}[dtype]

    def call(module):
        return call_in(module, dtype)

    plain, adapted = call(module.to(dtype)), with_lora(module)
    adapted.to(dtype)
    expected, found = call(merged(adapted)), call(adapted)
    assert max(errors(found, expected)) < min(limit, 1e-5) and min(errors(found, plain)) > 1e-2
    of_weights = weight_gradients(merged(adapted), call)
    sum((x * x).sum() for x in found).backward()
    assert len(lora_layers(adapted)) == len([key for key in of_weights if key.endswith("weight") and "norm" not in key])
    for key, layer in lora_layers(adapted).items():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        d_weight = of_weights[f"{key}.weight"].flatten(1)
        scaling = layer.scaling["default"]
        assert relative_error(down.grad.flatten(1), scaling * up.flatten(1).T @ d_weight) < limit, key
        assert relative_error(up.grad.flatten(1), scaling * d_weight @ down.flatten(1).T) < limit, key


@all_modules
def test_lora_merged_disabled_and_of_two_adapters(name):
    module, call = MODULES[name]()
    plain, adapted = call(module), with_lora(module)
    found = call(adapted)
    for layer in lora_layers(adapted).values():
        layer.merge()
    assert max(errors(call(adapted), found)) < 1e-5
    for layer in lora_layers(adapted).values():
        layer.unmerge()
        layer.enable_adapters(False)
    assert max(errors(call(adapted), plain)) < 1e-5
    for layer in lora_layers(adapted).values():
        layer.enable_adapters(True)
    assert max(errors(call(adapted), found)) < 1e-5
    for layer in lora_layers(adapted).values():
        layer.update_layer("other", 2, lora_alpha=4, config=peft.LoraConfig(r=2, lora_bias=True))
        nn.init.normal_(layer.lora_B["other"].weight, std=0.1)
    assert max(errors(call(adapted), found)) < 1e-5  # not active
    for layer in lora_layers(adapted).values():
        layer.set_adapter(["default", "other"])
    both = call(adapted)
    assert max(errors(both, call(merged(adapted)))) < 1e-5 and min(errors(both, found)) > 1e-3


@all_modules
@pytest.mark.parametrize("how", ("bf16", "autocast"))
def test_lora_in_half_precision(name, how):
    """What is added is not lost in the rounding of the weight."""
    module, call = MODULES[name]()
    adapted = with_lora(module)
    exact = call(merged(adapted))
    if how == "bf16":
        found = call(adapted.bfloat16(), torch.bfloat16)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = call(adapted)
    assert 1e-5 < max(errors(found, exact)) < 4e-2
    sum(x.float().square().sum() for x in found).backward()
    assert all(p.grad is not None and p.grad.any() for key, p in adapted.named_parameters() if "lora_" in key)


@all_modules
def test_lora_with_dropout(name):
    """In training the adapters' input loses values, whole in evaluation; the mean over draws is the product."""
    module, call = MODULES[name]()
    adapted = with_lora(module, lora_dropout=0.5)
    assert max(errors(call(adapted.eval()), call(merged(adapted)))) < 1e-5
    adapted.train()
    torch.manual_seed(0)
    first, second = call(adapted), call(adapted)
    assert min(errors(first, second)) > 1e-3
    torch.manual_seed(0)
    assert all(torch.equal(x, y) for x, y in zip(call(adapted), first, strict=True))


def test_dropout_of_lora_is_that_of_peft():
    """On layers that peft itself can call, with the same values dropped."""
    from mmattn._layers import convolve

    holder = with_lora(nn.Sequential(nn.Linear(16, 24)), lora_dropout=0.3)
    x = torch.randn(2, 9, 16)
    torch.manual_seed(3)
    expected = holder[0](x)
    torch.manual_seed(3)
    assert relative_error(convolve(x, holder[0], size=()), expected) < 1e-6


@pytest.mark.parametrize("name", ("RandomShiftAttention", "CoupledUNet"))
def test_a_variant_of_lora_is_called(name):
    module, call = MODULES[name]()
    undilated = [key for key, layer in layers_of(module).items() if getattr(layer, "dilation", (1,))[0] == 1]
    adapted = with_lora(module, undilated, use_dora=True)
    assert max(errors(call(adapted), call(merged(adapted)))) < 1e-4


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@all_modules
def test_parametrizations_and_pruning(name):
    """Weights that are computed in front of each call; without one the result would be another."""
    ways = {
        "parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
        "weight_norm": parametrizations.weight_norm,
        "spectral_norm": parametrizations.spectral_norm,
        "old weight_norm": nn.utils.weight_norm,
        "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.4),
        "pruned bias": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
    }
    for way, apply in ways.items():
        module, call = MODULES[name]()
        module.eval()
        plain = call(module)
        for layer in layers_of(module).values():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                apply(layer)
        found = call(module)
        sum((x * x).sum() for x in found).backward()
        assert all(p.grad is not None for p in module.parameters()), way
        dense = MODULES[name]()[0].eval()
        for key, layer in layers_of(module).items():
            layer(torch.zeros(1, layer.weight.shape[1], *(1 for _ in layer.weight.shape[2:])))  # sets what hooks set
            dense.get_submodule(key).weight.data.copy_(layer.weight)
            dense.get_submodule(key).bias.data.copy_(layer.bias)
        assert max(errors(found, call(dense))) < 1e-4, way
        if way != "old weight_norm" and way != "weight_norm":
            assert min(errors(found, plain)) > 1e-3, way
        # A step moves the result: nothing computed is kept.
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.01)
        assert min(errors(call(module), found)) > 1e-4, way


@all_modules
def test_forward_hooks_run(name):
    module, call = MODULES[name]()
    module.eval()
    expected = call(module)
    seen, handles = {}, []

    def record(key):
        def hook(_, args, out):
            seen[key] = args[0], out

        return hook

    for key, layer in layers_of(module, (*LAYERS, nn.GroupNorm)).items():
        handles.append(layer.register_forward_hook(record(key)))
    assert max(errors(call(module), expected)) < 1e-5
    assert seen.keys() == layers_of(module, (*LAYERS, nn.GroupNorm)).keys()
    for handle in handles:
        handle.remove()
    for key, (x, out) in seen.items():  # in the layer's own shapes
        assert torch.equal(module.get_submodule(key)(x), out)
    for layer in layers_of(module).values():
        layer.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    assert min(errors(call(module), expected)) > 1e-2


@all_modules
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # no input of these requires a gradient
def test_gradient_hooks_and_global_hooks_run(name):
    module, call = MODULES[name]()
    seen = set()
    for key, layer in layers_of(module).items():
        layer.register_full_backward_hook(lambda *_, key=key: seen.add(key))
    sum(x.sum() for x in call(module)).backward()
    assert seen == layers_of(module).keys()
    fresh, called = MODULES[name]()[0], []
    with nn.modules.module.register_module_forward_hook(lambda m, args, out: called.append(m)):
        call(fresh)
    assert set(layers_of(fresh).values()) <= set(called)


class Scaled(nn.Conv1d):
    def forward(self, x):
        return 3 * super().forward(x)


@all_modules
def test_layers_of_other_classes_and_paddings(name):
    module, call = MODULES[name]()
    module.eval()
    expected = call(module)
    for layer in layers_of(module, nn.Conv1d).values():
        layer.__class__ = Scaled
    linear = {key: layer for key, layer in layers_of(module, nn.Linear).items() if "embedding" not in key}
    for layer in linear.values():
        layer.forward = lambda x, layer=layer: 3 * nn.functional.linear(x, layer.weight, layer.bias)
    found = call(module)
    assert min(errors(found, expected)) > 1e-2
    tripled = MODULES[name]()[0].eval()
    with torch.no_grad():
        for key in {**layers_of(module, nn.Conv1d), **linear}:
            for parameter in tripled.get_submodule(key).parameters():
                parameter.mul_(3)
    assert max(errors(found, call(tripled))) < 1e-4


@pytest.mark.parametrize("name", ("DilatedConvBlock", "CoupledUNet"))
def test_another_padding_mode(name):
    module, call = MODULES[name]()
    expected = call(module)
    convolutions = layers_of(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)).values()
    for layer in convolutions:
        layer.padding_mode = "replicate"
        # As the constructor makes it of a mode that is not "zeros".
        layer._reversed_padding_repeated_twice = [n for n in reversed(layer.padding) for _ in range(2)]
    found = call(module)
    assert min(errors(found, expected)) > 1e-4
    for layer in convolutions:  # a layer that is called, with the same padding
        layer.register_forward_hook(lambda m, args, out: None)
    assert max(errors(call(module), found)) < 1e-6


def test_padding_mode_of_the_published_audio_block():
    from published import PublishedAudioBlock

    published = fill(PublishedAudioBlock(64, 96, 4, embedding_channels=24))
    convolution = published.audio_in_layers[2].audio_conv
    convolution.padding_mode, convolution._reversed_padding_repeated_twice = "circular", (4, 4)
    made, _ = audio_block()
    made.load_state_dict(published.state_dict())
    made.conv1.padding_mode, made.conv1._reversed_padding_repeated_twice = "circular", (4, 4)
    audio, emb = torch.randn(2, 64, 53), torch.randn(2, 24)
    assert relative_error(made(audio, emb), published(audio, emb)) < 1e-5


@all_modules
@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation(name):
    module, call = MODULES[name]()
    module.eval()
    with torch.no_grad():
        expected = call(module)
        quantised = torch.ao.quantization.quantize_dynamic(module, {nn.Linear})
        found = call(quantised)
    assert not layers_of(quantised, nn.Linear)
    assert 1e-5 < max(errors(found, expected)) < 5e-2


@all_modules
def test_sequential_offload(name):
    """The weights live elsewhere and are on the device as the layer is called."""
    accelerate = pytest.importorskip("accelerate")
    module, call = MODULES[name]()
    module.eval()
    with torch.no_grad():
        expected = call(module)
        accelerate.cpu_offload(module, execution_device="cpu")
        assert all(p.is_meta for p in module.parameters())
        assert max(errors(call(module), expected)) < 1e-5


@all_modules
@pytest.mark.parametrize("storage", (torch.float8_e4m3fn, torch.bfloat16), ids=str)
def test_layerwise_casting(name, storage):
    from diffusers.hooks import apply_layerwise_casting

    module, call = MODULES[name]()
    module.eval()
    with torch.no_grad():
        expected = call(module)
        apply_layerwise_casting(module, storage_dtype=storage, compute_dtype=torch.float32)
        found = call(module)
        assert all(layer.weight.dtype == storage for layer in layers_of(module).values())
    assert 1e-4 < max(errors(found, expected)) < (2e-1 if storage == torch.float8_e4m3fn else 2e-2)
    assert all(x.dtype == torch.float32 for x in found)


@pytest.mark.parametrize("name", ("RandomShiftAttention", "DilatedConvBlock"))
def test_lora_compiles_in_one_graph(name, fresh_dynamo):
    module, call = MODULES[name]()
    adapted = with_lora(module.eval())
    with torch.no_grad():
        expected = call(adapted)
        found = call(torch.compile(adapted, fullgraph=True, backend="eager"))
    assert max(errors(found, expected)) < 1e-5


def test_autocast_of_the_unet_takes_streams_of_different_dtypes():
    made, call = unet()
    exact = call(made)
    for model in (
        lambda v, a, *x, **options: made(v.bfloat16(), a, *x, **options),
        lambda v, a, *x, **options: made(v, a.bfloat16(), *x, **options),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            assert max(errors(call(model), exact)) < 4e-2


def test_published_checkpoints_have_no_place_for_adapters():
    made, _ = unet()
    adapted = with_lora(made, ["conv1"])
    with pytest.raises(ValueError, match=r"ResidualBlock has a parameter audio.conv1.base_layer.weight, unknown"):
        adapted.to_published()
    assert merged(adapted).to_published().keys() == unet()[0].to_published().keys()
