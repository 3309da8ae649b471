"""The members of tar archives, each as a file of its own."""

import shutil
import tarfile
import tempfile
from collections.abc import Iterator

from llama_jax.config import UserError
from llama_jax.data.files import CorpusFile
from llama_jax.data.listing import is_left_out
from llama_jax.data.readers.packed import unpacked
from llama_jax.data.readers.record import SkippedFile


def members(archive: CorpusFile) -> Iterator[CorpusFile | SkippedFile]:
    """The archive's files in their order, each on disk for as long as the next is not asked for.

    Left out are the names that are left out in directories. Raises UserError for a damaged archive.
    """
    try:
        with unpacked(archive) as content, tarfile.open(fileobj=content, mode="r|") as tar:  # type: ignore[call-overload]
            for member in tar:
                path = f"{archive.path}/{member.name.removeprefix('./')}"
                if member.isdir() or any(map(is_left_out, member.name.split("/"))):
                    continue
                if (held := tar.extractfile(member) if member.isfile() else None) is None:
                    yield SkippedFile(path, "no ordinary file (a link, a pipe or a device)")
                    continue
                with tempfile.NamedTemporaryFile(prefix="llama_jax-member-") as copy:
                    shutil.copyfileobj(held, copy)
                    copy.flush()
                    yield CorpusFile(path, member.size, False, copy=copy.name)
    except tarfile.TarError as error:
        raise UserError(f"'{archive.path}' is a damaged tar archive ({error}): get it again or leave it out") from None
