"""Run folders: their files, event log, code snapshot and environment."""
