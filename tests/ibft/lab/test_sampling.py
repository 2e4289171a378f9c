"""What judges the programs that the lab's models write."""

import itertools

from ibft.lab.jobs import Tasks
from ibft.lab.language import run_program
from ibft.lab.plan import quick_plan
from ibft.lab.tasks import run_operations


def test_the_probes_tell_programs_apart() -> None:
    from ibft.lab.sampling import judge, probe_lists

    lists = probe_lists()
    tasks = Tasks.of(quick_plan(0), 0).held_out
    for task, other in itertools.pairwise(tasks):
        assert judge(task, task.program) == "correct"
        same = all(run_operations(task.operations, xs) == run_operations(other.operations, xs) for xs in lists)
        assert (judge(task, other.program) == "correct") == same
        assert judge(task, task.program.replace("return", "retrun")) == "invalid"
        assert run_program(task.program, lists) == [run_operations(task.operations, xs) for xs in lists]
