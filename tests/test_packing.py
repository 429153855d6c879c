"""Linear layers in the layout of a processor's kernels, whatever the model is for."""

from __future__ import annotations

import accelerate.hooks
import pytest
import torch
import transformers

from backend.adapters import packing
from backend.adapters.packing import FEW, MANY, Packing, keep_packed
from tests.checkpoints import BUILDERS as TEXTS
from tests.checkpoints import built_when_asked, sentence
from tests.generic_checkpoints import LABELS
from tests.speech_checkpoints import BUILDERS as SPEECH
from tests.test_leaving_a_batch import BUILDERS, CASES, Case, Run, same

FAMILIES = ("question_answerer", "cross_encoder", "nli", "detr", "clip", "idefics3", "vilt")
FAMILIES += ("stable_diffusion", "ctc_without_mask", "whisper")
OTHERS = [
    Case("embeddings", "masked_lm", "red", sentence(9)),
    Case("token-classification", "token_classifier", "red", sentence(9)),
    Case("feature-extraction", "masked_lm", "red", sentence(9), part="pipeline.model"),
    Case("summarization", "bart", "red", sentence(9), options={"max_tokens": 8}),
    Case("summarization", "t5", "red", sentence(9), options={"max_tokens": 8}),
]
SOUND = Case("text-to-audio", "musicgen", "red", LABELS[0], part="model.model")
KINDS = {case.family: case for case in CASES if case.family in FAMILIES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return built_when_asked(BUILDERS | SPEECH | TEXTS, tmp_path_factory.mktemp("families"))


@pytest.fixture
def pays(monkeypatch):
    """Has it found to pay, once ``pays()`` was called."""
    monkeypatch.setattr(packing, "PAYS", 1e9)
    packing._pays.cache_clear()
    monkeypatch.setattr(packing, "SETTLED", 10**6)
    yield lambda: monkeypatch.setattr(packing, "SETTLED", 2)
    packing._pays.cache_clear()


def packs():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    model.dtype, model.device = torch.float32, torch.device("cpu")
    Packing(model).before_run(MANY)
    return type(model[0]) is not torch.nn.Linear


def parts(adapter):
    """The parts of which an adapter packs the layers."""
    if hasattr(adapter, "pipeline") and hasattr(adapter.pipeline, "components"):
        return [adapter.denoiser, adapter.pipeline.text_encoder]
    owner = getattr(adapter, "_listener", None) or getattr(adapter, "pipeline", None) or adapter
    return [getattr(owner, "_model", None) or owner.model]


def plain_layers(*models):
    return [
        name
        for model in models
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear
    ]


@pytest.mark.parametrize("case", [*KINDS.values(), *OTHERS], ids=lambda case: case.family)
def test_float32_layers_are_packed_once_a_model_has_run_for_a_while(make_app, folders, case, pays):
    if not packs():
        pytest.skip("this processor has no kernels for it")
    run = Run(make_app([{"id": "it", "type": case.type, "hf_model": folders(case.family)}]), case)
    first = run([case.stayer])[0].output
    before = len(plain_layers(*parts(run.adapter)))
    assert before > 3
    pays()
    for _ in range(before + 3):
        last = run([case.stayer])[0].output
    left = plain_layers(*parts(run.adapter))
    # T5 looks at the weight of this one, and heads are often one with the embeddings.
    assert not [name for name in left if not name.endswith((".wo", "lm_head", "decoder"))]
    assert any(name.endswith(".wo") for name in left) == (case.family == "t5")
    assert same(first, last, within=1 if case.part == "denoiser" else 1e-4)  # a pixel by 1
    run.adapter.unload()


def test_the_same_seed_is_to_give_the_same_sound_so_none_of_its_layers_is_packed(
    make_app, folders, pays
):
    entry = {"id": "it", "type": SOUND.type, "hf_model": folders(SOUND.family)}
    run = Run(make_app([entry]), SOUND)
    layers = plain_layers(run.adapter.model.model)
    pays()
    first, *_, last = [run([SOUND.stayer])[0].output for _ in range(4)]
    assert plain_layers(run.adapter.model.model) == layers
    assert same(first, last, within=0)
    run.adapter.unload()


@pytest.mark.parametrize("family", ["masked_lm", "bart"])
def test_bfloat16_layers_are_packed_as_a_model_loads(folders, family):
    if not packs():
        pytest.skip("this processor has no kernels for it")
    auto = transformers.AutoModelForMaskedLM if family == "masked_lm" else None
    auto = auto or transformers.AutoModelForSeq2SeqLM
    model = auto.from_pretrained(folders(family), dtype=torch.bfloat16).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.inference_mode():
        before = model(ids).logits.float()
        keep_packed(model)
        after = model(ids).logits.float()
    # It is the embeddings.
    assert plain_layers(model) == (["cls.predictions.decoder"] if family == "masked_lm" else [])
    assert not model._forward_pre_hooks  # there is nothing left to do
    assert (after - before).abs().max() < 0.02 * before.abs().max()


def test_where_it_does_not_pay_layers_are_as_they_were(folders, monkeypatch):
    monkeypatch.setattr(packing, "SETTLED", 2)
    monkeypatch.setattr(packing, "PAYS", 0)
    packing._pays.cache_clear()
    model = transformers.AutoModelForMaskedLM.from_pretrained(folders("masked_lm")).eval()
    layers = plain_layers(model)
    keep_packed(model)
    for _ in range(2 * len(layers)):
        model(torch.tensor([[5, 6]]))
    packing._pays.cache_clear()
    assert plain_layers(model) == layers


@pytest.mark.parametrize("pack", [keep_packed, Packing])
@pytest.mark.parametrize(
    ("places", "left"),
    [
        pytest.param({"": "cpu"}, 0, id="all in one place"),
        pytest.param({"bert": "cpu", "cls": "cpu"}, 0, id="two in one place"),
        pytest.param(
            {
                "bert.embeddings": "cpu",
                "bert.encoder.layer.0": "cpu",
                "bert.encoder.layer.1": "disk",
                "cls": "cpu",
            },
            12,
            id="two places",
        ),
    ],
)
def test_what_has_a_device_map_is_packed_if_it_stays_in_one_place(
    folders, tmp_path, pack, places, left
):
    model = transformers.AutoModelForMaskedLM.from_pretrained(
        folders("masked_lm"), dtype=torch.bfloat16, device_map=places, offload_folder=tmp_path
    )
    pack(model)
    assert len(plain_layers(model.bert)) == left
    model(torch.tensor([[5, 6]]))


def test_a_part_that_is_moved_about_is_not_packed(folders):
    model = transformers.AutoModelForMaskedLM.from_pretrained(
        folders("masked_lm"), dtype=torch.bfloat16
    )
    model._hf_hook = accelerate.hooks.ModelHook()
    keep_packed(model)
    assert len(plain_layers(model.bert)) == 12


def test_what_is_packed_holds_no_model(folders):
    """Or an unloaded one's memory would be given back only when garbage is looked for."""
    import gc
    import weakref

    folder = folders("question_answerer")  # which has a layer of its own
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder)
    keep_packed(model)
    own = Packing(model)
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert own.over is False  # it knows of layers, and has none
    own.before_run(FEW)
