"""The facts about machine and code at the head of results."""

import re

import torch

import rlhf_kernels as rk
from rlhf_trainer.studies.machine import NOT_INSTALLED, UNKNOWN, commit, cpu_name, environment, output_of, versions


def test_a_processor_without_a_number_is_named_by_family_and_model(tmp_path):
    processors = ["cpu family : 25\nmodel : 17\nmodel name : {name}\n\n"] * 2
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("".join(processors).format(name="EPYC 9R14"))
    assert cpu_name(cpuinfo) == "EPYC 9R14"
    cpuinfo.write_text("".join(processors).format(name="AMD EPYC"))
    assert cpu_name(cpuinfo) == "AMD EPYC, family 25 model 17"
    assert cpu_name(tmp_path / "none") == cpu_name(tmp_path / "no other") != ""


def test_what_cannot_be_known_is_unknown(tmp_path):
    assert commit(tmp_path) == output_of("no-such-command") == output_of("git", "no-such-word") == UNKNOWN
    assert output_of("git", "--version").startswith("git version")
    assert versions("torch", "no-such-package") == {"torch": torch.__version__, "no-such-package": NOT_INSTALLED}


def test_the_environment_names_machine_versions_and_time():
    facts = environment()
    assert facts.keys() == {"device", "cores", "versions", "commit", "measured"}
    assert facts["versions"].keys() == {"rlhf_kernels", "torch", "transformers", "python"}
    assert facts["versions"]["rlhf_kernels"] == rk.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", facts["measured"])
