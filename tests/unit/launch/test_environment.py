from __future__ import annotations

import pytest

from hopescale.common.errors import LaunchError
from hopescale.common.rank_info import RankInfo
from hopescale.launch.environment import child_environ, find_node, find_nodes, find_rank_info

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "node[01-04]",
    "SLURM_STEP_NODELIST": "node[02-03]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.99",
}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


def test_a_process_on_its_own_has_no_place():
    assert find_rank_info({}) is None
    assert find_rank_info({"MASTER_ADDR": "node1", "MASTER_PORT": "1", "WORLD_SIZE": "1"}) is None


def test_torchrun_states_the_place():
    assert find_rank_info(TORCHRUN) == RankInfo(3, 4, 1, "node1", 29500)
    assert find_rank_info(TORCHRUN | SRUN) == RankInfo(3, 4, 1, "node1", 29500)
    alone = TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert find_rank_info(alone) == RankInfo(0, 1, 0, "node1", 29500)


def test_srun_states_the_place():
    assert find_rank_info(SRUN) == RankInfo(5, 8, 1, "node02", 15000 + 4567, bound=True)
    older = without(SRUN, "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")
    assert find_rank_info(older) == RankInfo(5, 8, 1, "node01", 15000 + 4567, bound=True)


def test_a_job_script_may_say_where_ranks_meet():
    script = {"MASTER_ADDR": "head", "MASTER_PORT": "4242", "WORLD_SIZE": "8"}
    assert find_rank_info(SRUN | script) == RankInfo(5, 8, 1, "head", 4242, bound=True)


@pytest.mark.parametrize(
    "environ",
    [
        BATCH,
        SRUN | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        SRUN | {"SLURM_STEP_ID": "4294967290"},
        SRUN | {"SLURM_STEP_ID": "4294967291"},
        SRUN | {"SLURM_STEP_ID": "-5"},
        without(SRUN, "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"),
    ],
    ids=[
        "batch script",
        "one task",
        "batch script from a step",
        "interactive step",
        "batch step",
        "batch step, signed",
        "no tasks",
    ],
)
def test_slurm_without_several_tasks_starts_one_process(environ):
    assert find_rank_info(environ) is None


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu5", "gpu5"),
        ("node1,node2", "node1"),
        ("node[01-03,07],gpu5", "node01"),
        ("node[7,9-12]", "node7"),
        ("gpu5,node[01-03]", "gpu5"),
        ("rack[1-2]node[3-4].cluster,x", "rack1node3.cluster"),
        ("a-b[008-010]-ib", "a-b008-ib"),
    ],
)
def test_the_first_host_of_a_list(hosts, first):
    assert find_rank_info(SRUN | {"SLURM_STEP_NODELIST": hosts}).address == first


def test_the_nodes_of_a_step():
    hosts = "node[008-010,3],gpu5,rack[1-2]n[7-8]"
    nodes = ["node008", "node009", "node010", "node3", "gpu5", "rack1n7", "rack1n8", "rack2n7", "rack2n8"]
    assert find_nodes(SRUN | {"SLURM_STEP_NODELIST": hosts}) == nodes
    assert find_nodes(without(SRUN, "SLURM_STEP_NODELIST")) == ["node01", "node02", "node03", "node04"]
    assert find_nodes({"SLURMD_NODENAME": "node3"}) == ["node3"] and len(find_nodes({})) == 1
    assert find_node({"SLURMD_NODENAME": "node3"}) == "node3"


@pytest.mark.parametrize("hosts", ["[1-2", ",node1", "node[]", "node 1", "]["])
def test_a_list_that_names_no_host(hosts):
    with pytest.raises(LaunchError, match="SLURM_STEP_NODELIST is .*, which names no host") as caught:
        find_rank_info(SRUN | {"SLURM_STEP_NODELIST": hosts})
    assert repr(hosts) in caught.value.message and "MASTER_ADDR" in caught.value.hint


@pytest.mark.parametrize("name", TORCHRUN)
def test_a_missing_variable_of_torchrun_is_named(name):
    with pytest.raises(LaunchError) as caught:
        find_rank_info(without(TORCHRUN, name))
    other = "WORLD_SIZE is '4'" if name != "WORLD_SIZE" else "RANK is '3'"
    assert f"{name} is not set" in caught.value.message and other in caught.value.message


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_JOB_NODELIST"])
def test_a_missing_variable_of_srun_is_named(name):
    with pytest.raises(LaunchError, match=f"{name} is not set.*SLURM_NTASKS is '8'"):
        find_rank_info(without(SRUN, name, "SLURM_STEP_NODELIST"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "4"}, "RANK is '4', must be a number from 0 to 3"),
        ({"RANK": "-1"}, "RANK is '-1', must be a number from 0 to 3"),
        ({"RANK": "one"}, "RANK is 'one', must be a number from 0 to 3"),
        ({"RANK": ""}, "RANK is empty"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', must be a number at least 1"),
        ({"WORLD_SIZE": "4.0"}, "WORLD_SIZE is '4.0'"),
        ({"LOCAL_RANK": "9"}, "LOCAL_RANK is '9'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000', must be a number from 1 to 65535"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is empty"),
    ],
)
def test_nonsense_of_torchrun_is_named_with_its_value(change, message):
    with pytest.raises(LaunchError) as caught:
        find_rank_info(TORCHRUN | change)
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_PROCID": "8"}, "SLURM_PROCID is '8', must be a number from 0 to 7"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS is 'many'"),
        ({"SLURM_STEP_ID": "x"}, "SLURM_STEP_ID is 'x'"),
        ({"SLURM_JOB_ID": "12_3"}, "SLURM_JOB_ID is '12_3'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0'"),
    ],
)
def test_nonsense_of_srun_is_named_with_its_value(change, message):
    with pytest.raises(LaunchError) as caught:
        find_rank_info(SRUN | change)
    assert caught.value.message.startswith(message)


def test_a_number_of_ranks_without_a_rank_is_not_taken_for_one_process():
    with pytest.raises(LaunchError, match="RANK is not set.*WORLD_SIZE is '4'"):
        find_rank_info({"WORLD_SIZE": "4"})


def test_a_child_finds_the_place_it_is_told():
    rank_info = RankInfo(1, 2, 1, "127.0.0.1", 4711)
    environ = child_environ({"HOME": "/home/me", "MASTER_PORT": "9"}, rank_info, 3)
    assert find_rank_info(environ) == rank_info
    assert environ["HOME"] == "/home/me" and environ["OMP_NUM_THREADS"] == "3"
    assert child_environ({"OMP_NUM_THREADS": "8"}, rank_info, 3)["OMP_NUM_THREADS"] == "8"
