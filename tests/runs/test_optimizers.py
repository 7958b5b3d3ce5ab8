"""Optimizers by name, groups with learning rates of their own, and their schedule."""

import pytest
import torch
from helpers import net
from torch import nn

import lora_adapters as la
from lora_adapters.errors import MissingDependencyError, RequestError
from lora_adapters.recipes.sections import TrainingSection
from lora_adapters.runs.optimizers import Schedule, make_optimizer, parameter_groups
from lora_adapters.runs.schedule import learning_rate_share


class AnyOptimizer(TrainingSection):
    optimizer: str = "adamw"


def make(name, *, decay=0.0, parameters=None, **options):
    section = AnyOptimizer(optimizer=name, learning_rate=0.1, weight_decay=decay)
    return make_optimizer(section, [nn.Parameter(torch.ones(3))] if parameters is None else parameters, **options)


@pytest.mark.parametrize(
    ("name", "cls"), [("adamw", "AdamW"), ("sgd", "SGD"), ("RAdam", "RAdam"), ("Adafactor", "Adafactor")]
)
def test_classes_of_torch_by_name(name, cls):
    made = make(name, decay=0.25)
    assert type(made) is getattr(torch.optim, cls)
    assert made.param_groups[0]["lr"] == 0.1
    assert made.param_groups[0]["weight_decay"] == 0.25


def test_no_decay_is_no_decay():
    """Where the class would decay by itself, as AdamW does."""
    assert make("adamw").param_groups[0]["weight_decay"] == 0.0


def test_eight_bits():
    bnb = pytest.importorskip("bitsandbytes")
    assert isinstance(make("adamw_8bit"), bnb.optim.AdamW8bit)


def test_options_reach_the_class():
    assert make("adamw", betas=(0.5, 0.6)).param_groups[0]["betas"] == (0.5, 0.6)
    with pytest.raises(RequestError, match=r"optimizer_options: sgd does not take them.*beta"):
        make("sgd", betas=(0.5, 0.6))


@pytest.mark.parametrize(("name", "hint"), [("AdamWW", "'AdamW'"), ("LBFGS", "no 'LBFGS'"), ("prodigi", "'prodigy'")])
def test_unknown_names(name, hint):
    with pytest.raises(RequestError, match=hint):
        make(name)


def test_a_class_without_decay_says_so():
    with pytest.raises(RequestError, match="Rprop has none"):
        make("Rprop", decay=0.1)


def test_lora_plus_and_a_rate_for_each_model():
    models = {"unet": net(), "text_encoder": net()}
    for model in models.values():
        la.attach(model, rank=2)
    groups = parameter_groups(models, {"unet": 1e-3, "text_encoder": 1e-4}, lora_plus=16.0)
    names = {id(p): n for model in models.values() for n, p in model.named_parameters()}
    assert [group["lr"] for group in groups] == [1e-3, 16e-3, 1e-4, 16e-4]
    for group, inside in zip(groups, ["lora_A", "lora_B"] * 2, strict=True):
        assert group["params"]
        assert all(inside in names[id(p)] for p in group["params"])
    plain = parameter_groups(models, {"unet": 1e-3, "text_encoder": 1e-4})
    assert [len(group["params"]) for group in plain] == [len(groups[i]["params"]) * 2 for i in (0, 2)]


def test_the_schedule_keeps_the_ratio_of_groups():
    training = AnyOptimizer(schedule="cosine", warmup=3, learning_rate=1.0)
    a, b = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = make_optimizer(training, [{"params": [a], "lr": 1.0}, {"params": [b], "lr": 8.0}])
    schedule = Schedule(training, optimizer, 20)
    for done in (7, 0, 3, 19):  # nothing is kept between calls
        schedule.step_update(done)
        share = learning_rate_share(training, done, 20)
        assert [group["lr"] for group in optimizer.param_groups] == [share, 8 * share]


def prodigy_by_the_paper(x, gradient, steps, d0=1e-6, beta1=0.9, beta2=0.999, eps=1e-8):
    """Algorithm 4 of arXiv:2306.06101 (Prodigy, Adam version), with beta3 = sqrt(beta2) as the authors run it."""
    x0, m, v, s = x.clone(), torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    d, r, beta3 = d0, 0.0, beta2**0.5
    for _ in range(steps):
        g = gradient(x)
        m = beta1 * m + (1 - beta1) * d * g
        v = beta2 * v + (1 - beta2) * d**2 * g**2
        # the authors weigh both sums by d / d0 instead of (1 - beta3) d: their ratio is the same
        r = beta3 * r + d / d0 * d * float(g @ (x0 - x))
        s = beta3 * s + d / d0 * d * g
        found = r / float(s.abs().sum())
        following = max(d, found)
        x = x - d * m / (v.sqrt() + following * eps)
        d = following
    return x


def test_prodigy_is_the_papers():
    pytest.importorskip("prodigyopt")
    target = torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64)
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = make_optimizer(AnyOptimizer(optimizer="prodigy", learning_rate=1.0), [parameter])
    for _ in range(60):
        parameter.grad = 2 * (parameter.detach() - target)
        optimizer.step()
    expected = prodigy_by_the_paper(torch.ones(3, dtype=torch.float64), lambda x: 2 * (x - target), 60)
    assert (parameter.detach() - torch.ones(3)).abs().max() > 0.1, "it found a step size"
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-9)


def test_prodigy_takes_one_learning_rate(capsys):
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in (1.0, 2.0)]
    try:
        import prodigyopt  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependencyError, match="prodigyopt"):
            make("prodigy", parameters=groups)
        return
    with pytest.raises(RequestError, match="leave out text_learning_rate and lora_plus"):
        make("prodigy", parameters=groups)
    make("prodigy", decay=0.1)
    assert capsys.readouterr().out == "", "stdout is the command's"
