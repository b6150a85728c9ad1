"""Reproduce a run: replay a step, rerun the whole run, compare two runs, and diagnose a failed one."""
