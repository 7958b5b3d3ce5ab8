"""What autograd keeps between forward and backward of one fused layer: its input and what is tiny."""

import pytest
import torch
from layer_checks import adapted, no_parent
from torch import nn

RANK, ROWS, SIZE = 4, 64, 128
X = ROWS * SIZE


def kept_bytes(model, x, auto=None):
    """Bytes of the storages that are saved, each counted once, without those of parameters and of the base."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=auto, enabled=auto is not None):
            y = model(x)
    assert y.requires_grad
    return sum(seen.values())


def layer(dtype=torch.float32, adapter=torch.float32, dropouts=(0.0,), module=None, quantization=None):
    module = (module or nn.Linear(SIZE, 3 * SIZE)).to(dtype)
    model, inner = adapted(module, dropouts, (RANK, RANK), quantization=quantization)
    for part in inner.factor_names:
        getattr(inner, part).to(adapter)
    return model.train(), inner


# dtype of base, adapter, autocast, input; bytes of one value of x and of h as they are kept, and of the factors' casts
CASES = {
    "fp32": (torch.float32, torch.float32, None, torch.float32, 4, 4, 0),
    "bf16": (torch.bfloat16, torch.bfloat16, None, torch.bfloat16, 2, 2, 0),
    "fp32 adapters on bf16": (torch.bfloat16, torch.float32, None, torch.bfloat16, 2, 4, 0),
    "autocast": (torch.float32, torch.float32, torch.bfloat16, torch.float32, 2, 2, 2),
    "autocast of a bf16 base": (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16, 2, 2, 2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_dense_layer_keeps_its_input_and_what_is_tiny(case):
    base, adapter, auto, x_dtype, each_x, each_h, each_factor = case
    model, inner = layer(base, adapter)
    x = torch.randn(4, ROWS // 4, SIZE).to(x_dtype).requires_grad_()
    with no_parent(inner):
        mine = kept_bytes(model, x, auto)
    assert mine == X * each_x + ROWS * RANK * each_h + RANK * 4 * SIZE * each_factor
    inner.fused = False
    assert mine <= kept_bytes(model, x, auto)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_merged_layer_keeps_its_input_alone(case):
    base, adapter, auto, x_dtype, _, _, _ = case
    model, inner = layer(base, adapter, quantization="nf4")
    x = torch.randn(ROWS, SIZE).to(x_dtype).requires_grad_()
    with no_parent(inner):
        # The layer's compute dtype is the base's; where all products take 16 bits, 16 bits are kept.
        narrow = auto is not None and base == auto
        assert kept_bytes(model, x, auto) == X * (2 if narrow else x.element_size())


@pytest.mark.parametrize("module", [nn.Linear(SIZE, SIZE), nn.Conv1d(SIZE, SIZE, 1)], ids=["linear", "conv"])
def test_dropout_keeps_no_mask(module):
    shape = (ROWS, SIZE) if isinstance(module, nn.Linear) else (1, SIZE, ROWS)
    model, inner = layer(dropouts=(0.5, 0.1), module=module)
    with no_parent(inner):
        assert kept_bytes(model, torch.randn(shape).requires_grad_()) == 4 * (X + 2 * ROWS * RANK)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_convolution(quantization):
    model, inner = layer(module=nn.Conv2d(16, 32, 3, padding=1), quantization=quantization)
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    with no_parent(inner):
        assert kept_bytes(model, x) == 4 * (x.numel() + (0 if quantization else 2 * RANK * 16))
        # For a large image the update is merged into a dense fp32 weight too, for the call.
        large = torch.randn(2, 16, 32, 32, requires_grad=True)
        assert kept_bytes(model, large) == 4 * large.numel()


def test_nothing_is_kept_without_gradients():
    model, _ = layer()
    with torch.no_grad():
        assert model(torch.randn(3, SIZE)).grad_fn is None
    model.requires_grad_(False)
    assert model(torch.randn(3, SIZE)).grad_fn is None


def test_backward_frees_what_was_kept():
    import gc
    import weakref

    model, _ = layer(torch.float32, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(ROWS, SIZE))
    kept = []
    node = y.grad_fn
    while node is not None and not hasattr(node, "saved_tensors"):
        node = next((child for child, _ in node.next_functions if child is not None), None)
    kept = [weakref.ref(t) for t in node.saved_tensors if t is not None and t.shape == (ROWS, SIZE)]
    y.sum().backward()
    gc.collect()
    with pytest.raises(RuntimeError, match="second time"):
        _ = node.saved_tensors
    assert kept
    assert all(t() is None for t in kept)
