"""A broken plugin never breaks a user's run and never goes unmentioned."""

import types

import pytest

from lora_adapters import hookimpl
from lora_adapters.errors import PluginError, PluginWarning
from lora_adapters.hooks.manager import PluginManager
from lora_adapters.hooks.specs import BackendSpec, PlanEdit, QuantizerSpec, TargetMap


def module(name, **functions):
    made = types.ModuleType(name)
    for key, function in functions.items():
        setattr(made, key, hookimpl(function) if callable(function) else function)
    return made


def backend(name, **options):
    return BackendSpec(name, (name,), "pkg.mod:Class", **options)


@pytest.fixture
def manager():
    return PluginManager()


def test_a_plugin_that_raises_is_set_aside_and_the_others_serve(manager):
    def broken():
        raise RuntimeError("boom")

    manager.register(module("good", lora_adapters_backends=lambda: [backend("good")]), "good")
    manager.register(module("bad", lora_adapters_backends=broken), "bad")
    with pytest.warns(PluginWarning, match="'bad'.*RuntimeError: boom"):
        assert [spec.name for spec in manager.backends()] == ["good"]
    assert {s.name: s.state for s in manager.status()} == {"bad": "broken", "good": "ready"}


def test_strict_turns_a_failure_into_an_error(manager, monkeypatch):
    def broken():
        raise RuntimeError("boom")

    manager.register(module("bad", lora_adapters_backends=broken), "bad")
    monkeypatch.setenv("LORA_ADAPTERS_STRICT", "1")
    with pytest.raises(PluginError, match="boom"):
        manager.backends()


def test_a_misspelt_hook_is_reported(manager):
    with pytest.warns(PluginWarning, match="lora_adapters_backnds"):
        status = manager.register(module("typo", lora_adapters_backnds=lambda: []), "typo")
    assert status.state == "broken"


def test_a_forgotten_decorator_is_reported(manager):
    plugin = types.ModuleType("bare")
    plugin.lora_adapters_backends = lambda: []
    with pytest.warns(PluginWarning, match="lacks the @hookimpl"):
        assert manager.register(plugin, "bare").state == "broken"


def test_another_hook_api_is_reported(manager):
    plugin = module("future", lora_adapters_backends=lambda: [backend("future")], LORA_ADAPTERS_HOOK_API=99)
    with pytest.warns(PluginWarning, match="hook API 99"):
        assert manager.register(plugin, "future").state == "broken"
    assert manager.backends() == []


def test_a_wrong_return_value_is_reported(manager):
    manager.register(module("odd", lora_adapters_backends=lambda: ["no spec"]), "odd")
    with pytest.warns(PluginWarning, match="list of BackendSpec"):
        assert manager.backends() == []


def test_a_missing_package_gives_the_status_needs(manager):
    spec = backend("far", requires=("no_such_package_at_all",))
    manager.register(module("far", lora_adapters_backends=lambda: [spec]), "far")
    (status,) = manager.status()
    assert (status.state, status.detail) == ("needs", "no_such_package_at_all")


@pytest.mark.parametrize(("variable", "value"), [("LORA_ADAPTERS_DISABLE", "a"), ("LORA_ADAPTERS_PLUGINS", "b")])
def test_blocking(manager, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    for name in "ab":
        manager.register(module(name, lora_adapters_backends=lambda name=name: [backend(name)]), name)
    assert {s.name: s.state for s in manager.status()} == {"a": "blocked", "b": "ready"}
    assert [spec.name for spec in manager.backends()] == ["b"]


def test_tracing_prints_each_call(manager, monkeypatch, capsys):
    monkeypatch.setenv("LORA_ADAPTERS_TRACE", "1")
    manager.register(module("loud", lora_adapters_backends=lambda: [backend("loud")]), "loud")
    manager.backends()
    assert "lora_adapters_backends <- loud" in capsys.readouterr().err


def test_priority_orders_backends(manager):
    specs = [backend("low"), backend("high", priority=5)]
    manager.register(module("p", lora_adapters_backends=lambda: specs), "p")
    assert [spec.name for spec in manager.backends()] == ["high", "low"]


def test_a_quantizer_name_claimed_twice_is_reported(manager):
    spec = QuantizerSpec("int3", 3, ("linear",), "a.b:C")
    for name in ("one", "two"):
        manager.register(module(name, lora_adapters_quantizers=lambda: [spec]), name)
    with pytest.warns(PluginWarning, match="already plugin"):
        assert set(manager.quantizers()) == {"int3"}


def test_entry_points_load_one_by_one(manager, monkeypatch):
    class Entry:
        dist = None
        value = "x"

        def __init__(self, name, load):
            self.name, self.load = name, load

    def fails():
        raise ImportError("no such thing")

    good = module("good", lora_adapters_backends=lambda: [backend("good")])
    entries = [Entry("aaa", fails), Entry("good", lambda: good)]
    monkeypatch.setattr("lora_adapters.hooks.manager.metadata.entry_points", lambda group: entries)
    with pytest.warns(PluginWarning, match="ImportError: no such thing"):
        manager.load_entry_points()
    assert [spec.name for spec in manager.backends()] == ["good"]


def test_our_own_plugins_are_found():
    manager = PluginManager()
    manager.load_entry_points()
    assert "transformers" in {spec.name for spec in manager.backends()}


@pytest.mark.parametrize(
    "make",
    [
        lambda: BackendSpec("", ("x",), "a:B"),
        lambda: BackendSpec("x", ("x",), "no colon"),
        lambda: QuantizerSpec("q", 0, ("linear",), "a:B"),
        lambda: QuantizerSpec("q", 4, ("matrix",), "a:B"),
        lambda: TargetMap("x", ("*",), roles={"query": ("a",)}),
        lambda: TargetMap("x", ("*",), roles={"q": "not a tuple"}),
        lambda: TargetMap("x", ("*",), roles={"q": ("(",)}),
    ],
)
def test_specs_check_themselves(make):
    with pytest.raises(PluginError):
        make()


def test_plan_edit_is_data():
    assert PlanEdit("x", rank=3) == PlanEdit("x", rank=3)
