from __future__ import annotations

import copy

import pytest
import torch

import bridges
from recipes.alignment import TRACE, Alignment, TeacherTrace
from recipes.data.task import unmasked
from recipes.losses import hidden_state_loss, valid_tokens
from recipes.plan import HiddenStates
from recipes.recompute import recompute_layers
from tests.bridges import models, vlms
from tests.helpers import assert_close
from tests.recipes.toys import MODELS, batch

FORMS = {
    "injected": (HiddenStates(form="injected"), False),
    "beside": (HiddenStates(form="injected"), True),
    "chained": (HiddenStates(form="chained"), True),
    "layers": (HiddenStates(form="chained", at="layer"), True),
}
INSIDE = {"text_window": 4, "window": (1, 2, 2), "chunk_size": 8}


def pair(kind):
    teacher = MODELS[kind]().requires_grad_(False)
    student = copy.deepcopy(teacher)
    torch.manual_seed(0)
    bridges.replace_attention(student, "mmate", **INSIDE)
    for attention in bridges.attention_layers(student).values():
        attention.mixer.requires_grad_(True)
    return teacher, student.train()


def align(kind, form, checkpointing=False, teacher_and_student=None):
    """Return the loss a layer, the student's logits, and the student after the backward pass."""
    teacher, student = teacher_and_student or pair(kind)
    settings, own_stream = FORMS[form]
    inputs = batch(kind)
    labels = inputs.pop("labels")
    assert labels is not None
    if checkpointing:
        recompute_layers(student)
    recorder, alignment = TeacherTrace(teacher, student, settings), Alignment(student, settings, own_stream)
    trace = recorder(inputs)
    logits = student(**inputs, use_cache=False, **{TRACE: trace}).logits
    layers = {index: loss.detach() for index, loss in trace.by_layer("hidden_states").items()}
    trace.finish("hidden_states")["hidden_states"].backward()
    alignment.close()
    recorder.close()
    return layers, logits, student


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("form", list(FORMS))
def test_every_converted_layer_is_compared(kind, form):
    layers, _, _ = align(kind, form)
    assert sorted(layers) == [0, 1]
    assert all(0 < float(loss) < 10 for loss in layers.values())


@pytest.mark.parametrize("kind", list(MODELS))
def test_injected_is_the_mixer_on_the_teachers_input_against_the_teachers_output(kind):
    """Against a plain recording of the teacher's second layer, made with hooks of the test's own."""
    teacher, student = pair(kind)
    seen, inputs = {}, batch(kind)
    inputs.pop("labels")
    last = bridges.attention_layers(teacher)[1]
    hook = last.register_forward_hook(lambda m, a, k, out: seen.update(k, out=out[0]), with_kwargs=True)
    teacher(**inputs, use_cache=False)
    hook.remove()
    passed = {}
    attention = bridges.attention_layers(student)[1]
    hook = attention.register_forward_pre_hook(lambda m, a, k: passed.update(k), with_kwargs=True)
    student(**inputs, use_cache=False)
    hook.remove()
    made, _ = attention(**{**passed, "hidden_states": seen["hidden_states"]})
    expected = hidden_state_loss(made, seen["out"], valid_tokens(inputs))
    for form in ("injected", "beside"):
        layers, _, _ = align(kind, form, teacher_and_student=(teacher, copy.deepcopy(student)))
        torch.testing.assert_close(layers[1], expected.detach())


@pytest.mark.parametrize("kind", list(MODELS))
def test_injected_and_chained_agree_on_the_first_layer_and_differ_on_the_next(kind):
    injected, _, _ = align(kind, "injected")
    beside, _, _ = align(kind, "beside")
    chained, _, _ = align(kind, "chained")
    assert torch.equal(injected[0], chained[0])
    assert torch.equal(injected[0], beside[0])
    assert torch.equal(injected[1], beside[1])
    assert not torch.equal(injected[1], chained[1])


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_stream_is_the_teachers_or_the_students_own(kind):
    teacher, student = pair(kind)
    inputs = batch(kind)
    inputs.pop("labels")
    own, teachers = (model(**inputs, use_cache=False).logits for model in (student, teacher))
    valid = valid_tokens(inputs)
    for form in FORMS:
        _, logits, _ = align(kind, form, teacher_and_student=(teacher, copy.deepcopy(student)))
        wanted = teachers if form == "injected" else own
        torch.testing.assert_close(logits[valid], wanted[valid], rtol=1e-4, atol=1e-5)


def outputs(modules, run):
    """What modules gave while ``run`` ran."""
    found = {}
    hooks = [
        m.register_forward_hook(lambda m, a, out, i=i: found.update({i: out[0]})) for i, m in modules.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return found


def test_kinds_apart_are_averaged_each_by_itself():
    teacher, student = pair("qwen")
    inputs = batch("qwen")
    inputs.pop("labels")
    valid, vision = valid_tokens(inputs), inputs["input_ids"] == teacher.config.image_token_id
    assert vision.any()
    assert (valid & ~vision).any()
    theirs, own = (
        outputs(bridges.attention_layers(model), lambda model=model: model(**inputs, use_cache=False))
        for model in (teacher, student)
    )
    settings = HiddenStates(form="chained", kinds="apart")
    recorder, alignment = TeacherTrace(teacher, student, settings), Alignment(student, settings, True)
    trace = recorder(inputs)
    student(**inputs, use_cache=False, **{TRACE: trace})
    for index, loss in trace.by_layer("hidden_states").items():
        apart = [hidden_state_loss(own[index], theirs[index], kind) for kind in (valid & ~vision, vision)]
        torch.testing.assert_close(loss, sum(apart) / 2)
        assert not torch.isclose(*apart, rtol=1e-3)
    alignment.close()
    recorder.close()


@pytest.mark.parametrize("form", list(FORMS))
def test_kinds_apart_reach_every_form_and_change_nothing_where_there_is_one_kind(form, monkeypatch):
    together = {kind: align(kind, form)[0] for kind in MODELS}
    settings, own_stream = FORMS[form]
    monkeypatch.setitem(FORMS, form, (settings.model_copy(update={"kinds": "apart"}), own_stream))
    for kind, losses in together.items():
        apart, _, _ = align(kind, form)
        assert all((apart[layer] == losses[layer]) == (kind == "llama") for layer in losses)


@pytest.mark.parametrize("form", ["injected", "beside"])
def test_injected_layers_learn_independently(form):
    """The gradient of a layer's mixer does not change with what the other layers' mixers are."""
    teacher, student = pair("llama")
    other = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in bridges.attention_layers(other)[0].mixer.parameters():
            parameter.add_(0.1)
    gradients = []
    for model in (student, other):
        _, _, trained = align("llama", form, teacher_and_student=(teacher, model))
        gradients.append([p.grad for p in bridges.attention_layers(trained)[1].mixer.parameters()])
    for a, b in zip(*gradients):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("form", list(FORMS))
def test_gradient_checkpointing_changes_no_gradient(kind, form):
    plain, _, student = align(kind, form)
    again, _, checkpointed = align(kind, form, checkpointing=True)
    assert plain == again
    for (name, p), q in zip(student.named_parameters(), checkpointed.parameters()):
        if p.requires_grad and p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, msg=name)


class Alive:
    """Counts bytes saved for the backward pass that are alive at the same time."""

    def __init__(self):
        self.now = self.most = 0

    def pack(self, tensor):
        return Kept(self, tensor)


class Kept:
    def __init__(self, owner, tensor):
        self.owner, self.tensor, self.size = owner, tensor, tensor.numel() * tensor.element_size()
        owner.now += self.size
        owner.most = max(owner.most, owner.now)

    def __del__(self):
        self.owner.now -= self.size


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_layers_graph_is_alive_at_a_time(checkpointing):
    """Tensors saved for the backward pass: four layers need no more than a little over one."""
    most = {}
    for layers in (1, 4):
        teacher = MODELS["llama"](num_hidden_layers=layers).requires_grad_(False)
        student = copy.deepcopy(teacher)
        bridges.replace_attention(student, "mmate", **INSIDE)
        alive = Alive()
        with torch.autograd.graph.saved_tensors_hooks(alive.pack, lambda kept: kept.tensor):
            align("llama", "injected", checkpointing, teacher_and_student=(teacher, student.train()))
        most[layers] = alive.most
    assert most[4] < 2 * most[1]


def test_hooks_are_gone_after_closing():
    teacher, student = pair("llama")
    align("llama", "injected", teacher_and_student=(teacher, student))
    for model in (teacher, student):
        for attention in bridges.attention_layers(model).values():
            assert not attention._forward_hooks
            assert not attention._forward_pre_hooks


def right_padded(inputs):
    pads = (inputs["attention_mask"] == 0).sum(1).tolist()
    shape = inputs["input_ids"].shape
    return {
        key: torch.stack([row.roll(-count) for row, count in zip(table, pads)])
        if table.shape == shape
        else table
        for key, table in inputs.items()
    }


@pytest.mark.parametrize(
    ("zoo", "family"), [*((models, name) for name in models.FAMILIES), *((vlms, name) for name in vlms.VLMS)]
)
def test_no_valid_token_sees_right_padding_though_there_is_no_mask(zoo, family):
    teacher, inputs = zoo.teacher(family).eval(), right_padded(zoo.batch(family))
    valid = valid_tokens(inputs)
    assert not valid.all()
    with torch.no_grad():
        want, found = (
            teacher(**given, use_cache=False).logits[valid] for given in (inputs, unmasked(inputs))
        )
    assert_close(family, want, found, 1e-6)


def test_the_teacher_attends_by_the_causal_kernel(monkeypatch):
    teacher, student = pair("llama")
    masks, attention = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, is_causal=False, **kwargs):
        masks.append((attn_mask, is_causal))
        return attention(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    inputs = batch("llama")
    del inputs["labels"]
    assert not valid_tokens(inputs).all()
    recorder = TeacherTrace(teacher, student, HiddenStates())
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    trace = recorder(inputs)
    recorder.close()
    assert set(masks) == {(None, True)}
    assert torch.equal(trace.valid, valid_tokens(inputs))
