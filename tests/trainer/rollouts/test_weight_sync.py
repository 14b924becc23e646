"""How weights come to servers that a test scripts: what is sent, when, and what becomes of a server started anew."""

import re

import pytest
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_trainer.errors import UsageError
from rlhf_trainer.models.lora import put_adapter
from rlhf_trainer.rollouts.config import ServerConfig
from rlhf_trainer.rollouts.generation import Completion, Sampling
from rlhf_trainer.rollouts.http_json import Server
from rlhf_trainer.rollouts.loading import make_sampler
from rlhf_trainer.rollouts.sampler import Failure
from rlhf_trainer.rollouts.server import RESTARTS, ServerSampler
from rlhf_trainer.rollouts.weight_sync import Adapter, ByName, Reload, Workers, adapter_problem, choose_sync
from tests.trainer.conftest import VOCABULARY
from tests.trainer.rollouts.scripted_server import VLLM, Led, choices

pytestmark = pytest.mark.usefixtures("loopback_without_proxy")
SAMPLING = Sampling(max_new_tokens=4)


@pytest.fixture
def led(tokenizer):
    """(paths, way) -> the server and a sampler that leads it."""
    running = []

    def start(paths, way, count=1, **options):
        servers = [Led(*paths) for _ in range(count)]
        running.extend(server.running() for server in servers)
        urls = [context.__enter__() for context in running[-count:]]
        ends = [Server(url, 10.0, 1, 0.01) for url in urls]
        return (*servers, ServerSampler(ends, "base", tokenizer, ends=[1], vocabulary=VOCABULARY, way=way, **options))

    yield start
    for context in running:
        context.__exit__(None, None, None)


@pytest.fixture
def adapted(make_model):
    model = make_model("llama", seed=3)
    put_adapter(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    return model


def drawn(sampler, requests):
    return [done.ids for done in sampler.generate(requests, SAMPLING, seed=0, number=0)]


def names(server):
    return [path for path, _ in server.calls]


def test_an_adapter_travels_and_the_one_before_goes(led, adapted, tokenizer, requests, tmp_path):
    server, sampler = led(VLLM, Adapter())
    assert drawn(sampler, requests[:1]) == [[10]]
    for number in (1, 2):
        sampler.sync(adapted, tokenizer, tmp_path / "policy")
        assert drawn(sampler, requests[:1]) == [[10 + number]]
    loads = [body for path, body in server.calls if path == "v1/load_lora_adapter"]
    assert loads[0]["lora_name"] != loads[1]["lora_name"]
    assert names(server) == ["v1/load_lora_adapter", "v1/load_lora_adapter", "v1/unload_lora_adapter"]
    assert server.models == ["base", loads[1]["lora_name"]]
    (saved,) = (tmp_path / "policy").iterdir()
    assert str(saved) == loads[1]["lora_path"]
    assert {path.name for path in saved.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not list(saved.glob("model*.safetensors"))  # only the adapter


def test_workers_read_a_folder_while_nothing_is_drawn(led, make_model, tokenizer, requests, tmp_path):
    server, sampler = led(VLLM, Workers())
    model = make_model("llama", seed=4)
    sampler.sync(model, tokenizer, tmp_path)
    assert names(server) == ["pause?mode=abort", "collective_rpc", "reset_prefix_cache", "resume"]
    (folder,) = tmp_path.iterdir()
    assert server.calls[1][1] == {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert saved.lm_head.weight[3, 0].item() == model.lm_head.weight[3, 0].item()
    assert drawn(sampler, requests) == [[11]] * 4 and sampler.model_name == "base"


def test_workers_read_a_head_that_is_the_embeddings_as_well(make_model, tokenizer, tmp_path):
    """A server that packed a copy of it when it started would keep that."""
    model = make_model("qwen3", seed=4)
    put_adapter(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    for way, names in (
        (Workers(), {"lm_head.weight", "model.embed_tokens.weight"}),
        (Reload(), {"model.embed_tokens.weight"}),
    ):
        for number, kept in enumerate((make_model("qwen3", seed=4), model)):
            folder = tmp_path / f"{type(way).__name__}{number}"
            way.save(kept, tokenizer, folder)
            weights = load_file(folder / "model.safetensors")
            assert {name for name in weights if len(weights[name]) == VOCABULARY} == names
            assert all(weights[name].equal(model.lm_head.weight) for name in names)
            loaded = AutoModelForCausalLM.from_pretrained(folder)
            assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_sglang_loads_from_disk_and_transformers_by_name(led, make_model, tokenizer, tmp_path):
    server, sampler = led(["/update_weights_from_disk"], Reload())
    sampler.sync(make_model("llama"), tokenizer, tmp_path / "sglang")
    assert server.calls == [("update_weights_from_disk", {"model_path": str(next((tmp_path / "sglang").iterdir()))})]
    server, sampler = led([], ByName())
    for _ in range(2):
        sampler.sync(make_model("llama"), tokenizer, tmp_path / "serve")
        assert [sampler.model_name] == [str(path) for path in (tmp_path / "serve").iterdir()]
    assert server.calls == []


@pytest.mark.parametrize(
    ("way", "fails"),
    [(Workers, "/collective_rpc"), (Workers, "/pause?mode=abort"), (Reload, "/update_weights_from_disk")],
)
def test_a_server_that_does_not_take_weights_stops_the_run(led, make_model, tokenizer, tmp_path, way, fails):
    server, sampler = led(VLLM, way())
    server.fails = {fails}
    with pytest.raises(UsageError, match=r"weight_sync: http://\S+ did not take the policy in .*it does not fit"):
        sampler.sync(make_model("llama"), tokenizer, tmp_path)
    assert names(server)[-1] == {"/collective_rpc": "resume"}.get(fails, fails.strip("/"))  # it is not left paused


def test_no_sync_leaves_the_server_and_the_folder_alone(led, make_model, tokenizer, tmp_path):
    server, sampler = led(VLLM, None)
    sampler.sync(make_model("llama"), tokenizer, tmp_path / "policy")
    assert not (tmp_path / "policy").exists() and not server.requests


@pytest.mark.parametrize("way", [Adapter, Workers])
def test_a_server_started_anew_gets_the_policy_again(led, adapted, tokenizer, requests, tmp_path, way, capsys):
    """What it drew with its own weights does not count."""
    server, sampler = led(VLLM, way(), concurrency=1)
    sampler.sync(adapted, tokenizer, tmp_path)
    server.restart_at = {2}
    assert drawn(sampler, requests) == [[11]] * 4
    assert server.drawn > 4 and names(server).count(way.path.strip("/")) == 2
    assert "started anew; gets the policy again, and 4 prompts are drawn again" in capsys.readouterr().out


def test_a_server_that_is_always_started_anew_stops_the_run(led, make_model, tokenizer, requests, tmp_path):
    server, sampler = led(VLLM, Workers(), concurrency=1)
    sampler.sync(make_model("llama"), tokenizer, tmp_path)
    server.restart_at = set(range(1, 1000, 3))
    with pytest.raises(UsageError, match=f"started anew {RESTARTS} times within 4 completions"):
        drawn(sampler, requests)


def test_several_servers_share_the_work_and_all_get_the_policy(led, make_model, tokenizer, requests, tmp_path):
    one, two, sampler = led(VLLM, Workers(), count=2)
    sampler.sync(make_model("llama"), tokenizer, tmp_path)
    assert names(one) == names(two)
    different = [request._replace(ids=[*request.ids, k]) for k in range(2, 8) for request in requests]
    assert drawn(sampler, different) == [[11]] * 24
    assert one.drawn + two.drawn == 24 and one.drawn and two.drawn
    metrics = sampler.metrics()
    assert metrics["rollouts/server_0/requests"] == one.drawn + 4 and metrics["rollouts/server_1/failures"] == 0


def test_what_one_server_fails_at_another_does(led, requests):
    one, two, sampler = led(VLLM, None, count=2, concurrency=1)
    one.answer = lambda path, body: (500, b"broken")
    assert drawn(sampler, requests) == [[10]] * 4
    assert two.drawn == 4 and 0 < sampler.metrics()["rollouts/server_0/failures"] < 4


def test_a_group_is_one_request(led, requests):
    server, sampler = led(VLLM, None)
    done = sampler.generate([requests[0]] * 3 + [requests[1]] * 2, SAMPLING, seed=0, number=0)
    assert done == [Completion([10], False)] * 5
    assert sorted(body["n"] for _, body in server.requests) == [2, 3]
    server.answer = lambda path, body: (400, b"too long") if body["n"] == 3 else server.reply(path, body)
    done = sampler.generate([requests[0]] * 3 + [requests[1]] * 2, SAMPLING, seed=0, number=0)
    assert [type(one) for one in done] == [Failure] * 3 + [Completion] * 2


def test_choices_come_in_their_order_and_all_of_them(led, requests):
    server, sampler = led(VLLM, None)
    ordered = choices([{"token_ids": [10]}, {"token_ids": [11]}])[1]["choices"]
    server.answer = lambda path, body: (200, {"choices": ordered[::-1]})
    done = sampler.generate([requests[0]] * 2, SAMPLING, seed=0, number=0)
    assert [one.ids for one in done] == [[10], [11]]
    server.answer = lambda path, body: server.reply(path, body) if body is None else (200, {"choices": ordered[:1]})
    (failure, _) = sampler.generate([requests[0]] * 2, SAMPLING, seed=0, number=0)
    assert "expected an answer with 2 choices, got 1 choices" in failure.reason


def test_the_way_is_chosen_by_what_trains_and_what_the_server_takes(led, adapted, make_model, tokenizer):
    def way(model, paths, kind="auto", **options):
        *_, sampler = led(paths, None)
        config = ServerConfig(
            output_dir="o", use_vllm=True, vllm_server_base_url=sampler.servers[0].url, weight_sync=kind, **options
        )
        made = make_sampler(config, model, tokenizer)
        assert made.metrics()["rollouts/server_0/failures"] == 0
        return type(made.way), made.model_name

    whole = make_model("llama")
    assert way(adapted, VLLM) == (Adapter, "base")
    assert way(adapted, VLLM, "folder") == way(whole, VLLM) == way(adapted, ["/collective_rpc"]) == (Workers, "base")
    assert way(whole, ["/update_weights_from_disk"])[0] is Reload
    assert way(whole, ["/load_model"])[0] is ByName
    assert way(whole, VLLM, server_model="mine") == (Workers, "mine")
    assert way(whole, [], "none") == (type(None), whole.name_or_path)
    for model, paths, kind, message in (
        (whole, VLLM, "lora", "weight_sync lora: the model is no adapter"),
        (adapted, [], "lora", "--enable-lora --max-lora-rank R. Or pass weight_sync none"),
        (
            whole,
            ["/v1/load_lora_adapter"],
            "auto",
            "`rlhf serve-vllm` starts a server that can; by hand: VLLM_SERVER_DEV",
        ),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            way(model, paths, kind)


def test_adapters_that_vllm_does_not_serve_travel_whole(make_model):
    model = make_model("llama")
    put_adapter(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], use_dora=True))
    config = ServerConfig(output_dir="o", use_vllm=True)
    assert config.server_urls == ["http://127.0.0.1:8000"]
    problem = adapter_problem(model, None)
    assert "use_dora" in problem
    with pytest.raises(UsageError, match=r"use_dora or lora_modules_to_save\. Take weight_sync folder"):
        choose_sync("lora", problem, [])
