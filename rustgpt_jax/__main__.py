"""`python -m rustgpt_jax VERB [flags]` does what `rustgpt VERB [flags]` does."""

from rustgpt_jax.cli.main import run_command

if __name__ == "__main__":
    run_command()
