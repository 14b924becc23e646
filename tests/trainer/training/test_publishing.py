"""The model card of a result, and its way to the hub, of which a stand-in takes the place."""

import pytest
import yaml

from rlhf_trainer.errors import UsageError
from rlhf_trainer.training import publishing


class Hub:
    """Remembers what is asked of it."""

    def __init__(self, refuses=()):
        self.refuses, self.calls = refuses, []

    def __call__(self):
        return self

    def do(self, name, *args, **options):
        self.calls.append((name, args, options))
        if name in self.refuses:
            raise OSError(f"401 for {name}")

    def whoami(self):
        self.do("whoami")

    def create_repo(self, name, **options):
        self.do("create_repo", name, **options)
        self.repo_id = f"me/{name}"
        return self

    def __str__(self):
        return f"https://hub/{self.repo_id}"

    def upload_folder(self, **options):
        self.do("upload_folder", **options)


@pytest.fixture
def hub(monkeypatch):
    def put(refuses=()):
        monkeypatch.setattr(publishing, "HfApi", Hub(refuses))
        return publishing.HfApi

    return put


def test_a_result_has_a_card(train, model_folder, write_jsonl, rows):
    data = write_jsonl(rows(6))
    folder, records = train(model_name_or_path=model_folder("llama"), dataset_name=data)
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == model_folder("llama") and head["datasets"] == [data]
    assert head["library_name"] == "transformers" and head["tags"] == ["rlhf_trainer", "dpo"]
    assert f"| loss | {records[-1]['loss']:.6g} |" in card
    config = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert config == yaml.safe_load((folder / "rlhf_config.yaml").read_text())
    assert "torch" in card and "transformers" in card


def test_the_card_of_an_adapter_says_so(train, model_folder, write_jsonl, rows):
    folder, _ = train(model_name_or_path=model_folder("llama"), dataset_name=write_jsonl(rows(6)), use_peft=True)
    assert "library_name: peft" in (folder / "README.md").read_text()


def test_a_result_is_pushed(train, model_folder, write_jsonl, rows, hub, capsys):
    api = hub()
    options = {"push_to_hub": True, "hub_model_id": "mine", "hub_private_repo": True}
    folder, _ = train(model_name_or_path=model_folder("llama"), dataset_name=write_jsonl(rows(6)), **options)
    assert [name for name, *_ in api.calls] == ["whoami", "create_repo", "upload_folder"]
    assert api.calls[1][1:] == (("mine",), {"private": True, "exist_ok": True})
    upload = api.calls[2][2]
    assert upload["repo_id"] == "me/mine" and upload["folder_path"] == folder
    assert upload["ignore_patterns"] == ["checkpoints/*"]
    assert "pushed to https://hub/me/mine" in capsys.readouterr().out


def test_no_token_is_told_before_training(train, hub, tmp_path):
    hub(refuses=("whoami",))
    with pytest.raises(UsageError, match=r"push_to_hub: log in first .*401 for whoami"):
        train(model_name_or_path="m", dataset_name="d", push_to_hub=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["create_repo", "upload_folder"])
def test_a_result_that_is_not_pushed_is_kept(call, train, model_folder, write_jsonl, rows, hub, tmp_path):
    hub(refuses=(call,))
    with pytest.raises(UsageError, match=f"is saved, but was not pushed as .*401 for {call}.*hf upload"):
        train(model_name_or_path=model_folder("llama"), dataset_name=write_jsonl(rows(6)), push_to_hub=True)
    (result,) = tmp_path.glob("*/model.safetensors")
    assert (result.parent / "README.md").is_file()
