"""Where the processes of a run that are not the first keep their records: all do the same, and one is believed."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rustgpt_jax.config.schema import Config
from rustgpt_jax.workdir.run_dir import RunFolder, create


@contextmanager
def shadow(path: Path, config: Config, origins: Mapping[str, str]) -> Iterator[Path]:
    """A folder that begins as the run's, is thrown away in the end, and shares nothing with it but the checkpoints.

    Raises UserError as `create` does.
    """
    with tempfile.TemporaryDirectory(prefix="rustgpt_jax_") as made:
        real, own = RunFolder(path.absolute()), RunFolder(Path(made) / path.absolute().name)
        create(own.path, config, origins)
        for file in (real.metrics_file, real.data_file, real.tokenizer_file):
            if file.exists():
                shutil.copyfile(file, own.path / file.name)
        own.parameters_file.symlink_to(real.parameters_file)
        own.checkpoints.symlink_to(real.checkpoints)
        yield own.path
