"""The model of docs/your_own_model.md, in a package of its own, is served like ours."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxserve
from jaxserve.errors import ModelError
from jaxserve.models import registry
from jaxserve.models.llama import Llama

PAGE = Path(__file__).parents[2] / "docs" / "your_own_model.md"
ARCEE = {"architectures": ["ArceeForCausalLM"]}
LOGITS = """
import sys
import numpy as np
from jaxserve.loading.checkpoint import open_checkpoint
from tests.models.ours import Ours
from tests.models.scenario import Part, prompts

ours = Ours(open_checkpoint(sys.argv[1]), "1x1")
[logits] = ours.run([Part("alone", 0, 23)], prompts())
np.save(sys.argv[1] + "/ours.npy", logits)
print(ours.model.code)
"""


def block(language: str) -> str:
    """The page's first of a language."""
    return re.search(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]


@pytest.fixture
def package(tmp_path):
    """A directory as it is when the page's package is installed in it."""
    project = tomllib.loads(block("toml"))["project"]
    place = tmp_path / "site"
    info = place / f"arcee_for_jaxserve-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (place / "arcee_for_jaxserve.py").write_text(block("python"))
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return place


def compute(package: Path, model: Path) -> str:
    """Our logits of a model, in a process that has the package; what is known of its code."""
    paths = [str(package), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", LOGITS, str(model)]
    return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_an_installed_package_s_model_is_that_of_transformers(package, tmp_path):
    torch = pytest.importorskip("torch")
    import numpy as np
    from transformers import ArceeConfig, ArceeForCausalLM

    from tests.models import reference
    from tests.models.scenario import prompts

    sizes = {"vocab_size": 131, "hidden_size": 54, "intermediate_size": 93, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "eos_token_id": 0, "bos_token_id": 0}
    torch.manual_seed(0)
    model = ArceeForCausalLM(ArceeConfig(**sizes, **heads)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            value = torch.randn(parameter.shape)
            norm = parameter.ndim == 1
            parameter.copy_(1 + 0.3 * value if norm else value * 1.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(tmp_path / "model")
    code = compute(package, tmp_path / "model")
    wanted = reference.logits(model, prompts()["alone"])
    assert wanted.std() > 1
    np.testing.assert_allclose(np.load(tmp_path / "model" / "ours.npy"), wanted, atol=1e-4)
    assert re.fullmatch(r"arcee_for_jaxserve.Arcee \w{64}\n", code)


def test_code_of_others_is_told_apart(package, monkeypatch):
    """Compiled programs are found by it."""
    monkeypatch.syspath_prepend(package)
    monkeypatch.delitem(sys.modules, "arcee_for_jaxserve", raising=False)
    before = registry.code_of(registry.model_class(ARCEE))
    file = package / "arcee_for_jaxserve.py"
    file.write_text(file.read_text().replace("up_proj", "down_proj"))
    assert registry.code_of(registry.model_class(ARCEE)) != before
    assert registry.code_of(Llama) == ""


def test_what_is_registered_goes_first(monkeypatch):
    monkeypatch.setattr(registry, "REGISTERED", {})

    class Mine(Llama):
        pass

    jaxserve.register_model("LlamaForCausalLM", Mine)
    jaxserve.register_model("OtherForCausalLM", "jaxserve.models.llama:Llama")
    assert registry.model_class({"architectures": ["LlamaForCausalLM"]}) is Mine
    assert registry.model_class({"architectures": ["OtherForCausalLM"]}) is Llama
    with pytest.raises(ModelError, match=r"OtherForCausalLM \(nearest: OtherForCausalLM\)"):
        registry.model_class({"architectures": ["OtherForCausalLm"]})


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("absent_package:Model", "absent_package:Model cannot be imported: No module named 'absent_package'"),
        ("json:Absent", "json:Absent cannot be imported: module 'json' has no attribute 'Absent'"),
        ("json:JSONDecoder", "JSONDecoder'> has no Config"),
    ],
)
def test_what_cannot_be_used_is_said(monkeypatch, model, said):
    monkeypatch.setattr(registry, "REGISTERED", {})
    jaxserve.register_model("MyForCausalLM", model)
    with pytest.raises(ModelError) as caught:
        registry.model_class({"architectures": ["MyForCausalLM"]})
    assert str(caught.value).startswith("architecture MyForCausalLM: ") and said in str(caught.value)


def test_a_broken_entry_point_names_itself(package, monkeypatch):
    monkeypatch.syspath_prepend(package)
    monkeypatch.delitem(sys.modules, "arcee_for_jaxserve", raising=False)
    (package / "arcee_for_jaxserve.py").write_text("1 / 0")
    with pytest.raises(ModelError, match="arcee_for_jaxserve:Arcee cannot be imported: division by zero"):
        registry.model_class(ARCEE)
