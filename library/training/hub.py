"""The Hugging Face hub: where saved files are sent to, and where a state can be fetched from.

The access token is never part of a message: whatever the hub's library says is cleaned of it, and its exceptions are
not passed on. The library is imported only where the hub is used.
"""

import logging
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from library.errors import Problem, UserError, raise_if_any
from library.training.options import HubOptions, ResumeOptions, SaveOptions
from library.training.states import MANIFEST, check_state, files_of
from library.training.uploads import Patience, RefusedError, UnreachedError, Uploads, persistently

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

LOGIN: Final = "Log in with: hf auth login; or set HF_TOKEN, or give --huggingface_token."

_CHECK_SECONDS: Final = 10.0
_UPLOAD_SECONDS: Final = 120.0
_FETCH_PATIENCE: Final = Patience(longest=10.0, one=60.0)
# Statuses that another attempt may not meet: time-outs, conflicts with another commit, too many requests.
_PASSING: Final = frozenset({408, 409, 412, 423, 425, 429})
_STATE_FORM: Final = re.compile(
    r"(?P<repo>[^/:]+/[^/:]+)/(?P<path>[^:]+)(:(?P<revision>[^:]*))?(:(?P<type>model|dataset|space)?)?"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """A repository of the hub.

    Attributes:
        name: Its id, ``owner/name``.
        type: ``model``, ``dataset`` or ``space``.
        folder: Where files go in it; empty for its root.
        private: Whether to make it a private one, if it is not there yet.
        token: The access token; None takes that of the environment or the log-in.
    """

    name: str
    type: str = "model"
    folder: str = ""
    private: bool = True
    token: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, options: HubOptions) -> "Repository | None":
        """Where the options want saved files to go; None for nowhere."""
        if options.huggingface_repo_id is None:
            return None
        return cls(
            name=options.huggingface_repo_id,
            type=options.huggingface_repo_type or "model",
            folder=options.huggingface_path_in_repo or "",
            private=options.huggingface_repo_visibility != "public",
            token=options.huggingface_token,
        )

    def place_of(self, path: Path) -> str:
        """Path in the repository of a saved file or folder."""
        return str(PurePosixPath(self.folder, path.name))


@dataclass(frozen=True, kw_only=True, slots=True)
class HubState:
    """A state on the hub.

    Attributes:
        repository: Where it is.
        path: Its folder there.
        revision: Branch, tag or commit.
        text: How it was given.
    """

    repository: Repository
    path: str
    revision: str
    text: str

    @classmethod
    def of(cls, options: HubOptions, resume: ResumeOptions) -> "HubState | None":
        """The state to continue from, as ``owner/name/path[:revision[:type]]``; None if none is asked for.

        Raises:
            UserError: It is not written so.
        """
        if not options.resume_from_huggingface:
            return None
        if resume.resume is None:
            raise UserError(
                "--resume_from_huggingface needs to be told which state",
                where="--resume_from_huggingface",
                remedy="Add --resume owner/name/path.",
            )
        text = resume.resume.as_posix()
        found = _STATE_FORM.fullmatch(text)
        if found is None or ".." in PurePosixPath(found["path"]).parts:
            raise UserError(
                f"{text} is no state on the hub",
                where="--resume",
                remedy="Write it as owner/name/path, owner/name/path:revision or owner/name/path:revision:type, where "
                "type is model, dataset or space.",
            )
        repository = Repository(name=found["repo"], type=found["type"] or "model", token=options.huggingface_token)
        return cls(
            repository=repository, path=found["path"].strip("/"), revision=found["revision"] or "main", text=text
        )


def check_hub(options: HubOptions, resume: ResumeOptions, save: SaveOptions) -> tuple[list[Problem], list[str]]:
    """What is wrong with the options, and what is worth telling; asks nobody, and imports nothing heavy."""
    problems: list[Problem] = []
    try:
        HubState.of(options, resume)
    except UserError as error:
        problems += error.problems
    notices = []
    if options.save_state_to_huggingface and not (save.save_state or save.save_state_on_train_end):
        notices.append("--save_state_to_huggingface has no effect without --save_state or --save_state_on_train_end")
    return problems, notices


def check_access(options: HubOptions) -> None:
    """Ask the hub whether the run may upload; where it does not answer only a warning says so.

    Raises:
        UserError: The token is missing, is refused, or does not allow to write to the repository.
    """
    repository = Repository.of(options)
    if repository is None:
        return
    try:
        _quiet_client(_CHECK_SECONDS)
        _guarded(repository, lambda api: _check_access(api, repository))
    except UnreachedError as error:
        log.warning("the hub does not answer (%s); uploads will be tried all the same", error)
    except RefusedError as error:
        remedy = f"{LOGIN} Or leave --huggingface_repo_id out."
        raise UserError(f"cannot upload: {error}", where="--huggingface_repo_id", remedy=remedy) from None


def _check_access(api: "HfApi", repository: Repository) -> None:
    account = api.whoami()
    name = str(account.get("name", ""))
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise RefusedError(f"the access token of {name} may only read")
    info = _info(api, repository)
    if info is None:
        owner = repository.name.split("/")[0]
        if owner not in (name, *(str(one.get("name")) for one in account.get("orgs") or ())):
            raise RefusedError(f"{repository.name} does not exist, and {name} cannot create it for {owner}")
        if repository.type == "space":
            raise RefusedError(f"the Space {repository.name} does not exist; create it on the hub's page first")
        return
    api.auth_check(repository.name, repo_type=repository.type, write=True)
    if repository.private and info.private is False:
        log.warning("%s is a public repository: everybody can see what is uploaded", repository.name)


def _info(api: "HfApi", repository: Repository) -> Any:
    """What the hub tells of the repository; None if there is none, or none that the token may see."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return api.repo_info(repository.name, repo_type=repository.type, timeout=_CHECK_SECONDS)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


def uploads_to_hub(options: HubOptions, *, is_main: bool, patience: Patience | None = None) -> Uploads | None:
    """The queue of files that go to the hub; None without a repository, and in every process but the main one."""
    repository = Repository.of(options)
    if repository is None or not is_main:
        return None
    log.info(
        "saved models%s are uploaded to %s", " and states" if options.save_state_to_huggingface else "", repository.name
    )
    return Uploads(Sender(repository), background=options.async_upload, patience=patience)


class Sender:
    """Sends saved files and folders to a repository, each in one commit; creates the repository if need be.

    What is there already with the same content is not sent again, so that an attempt may be repeated although the
    answer to an earlier one was lost.

    Args:
        repository: Where to.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._prepared = False
        self._exists = False

    def __call__(self, path: Path) -> None:
        """Send ``path``.

        Raises:
            RefusedError: The hub does not accept it, or it cannot be read.
            UnreachedError: The hub was not reached, or is not able to take it at the moment.
        """
        if not self._prepared:
            _quiet_client(_UPLOAD_SECONDS)
            self._prepared = True
        _guarded(self._repository, lambda api: self._send(api, path))

    def _send(self, api: "HfApi", path: Path) -> None:
        from huggingface_hub import CommitOperationAdd

        target = {"repo_id": self._repository.name, "repo_type": self._repository.type}
        if not self._exists:
            if _info(api, self._repository) is None:
                api.create_repo(**target, private=self._repository.private, exist_ok=True)
            self._exists = True
        place = self._repository.place_of(path)
        additions = [
            CommitOperationAdd(
                path_in_repo=str(PurePosixPath(place, file.relative_to(path).as_posix())), path_or_fileobj=file
            )
            for file in _files(path)
        ]
        for addition in additions:
            # One by one: several at once use threads, which the end of the program would wait for.
            api.preupload_lfs_files(**target, additions=[addition], free_memory=False)
        api.create_commit(**target, operations=additions, commit_message=f"Upload {path.name}")
        wanted = {addition.path_in_repo for addition in additions}
        missing = wanted - {found.path for found in api.get_paths_info(**target, paths=sorted(wanted))}
        if missing:
            raise RefusedError(f"the repository leaves out {', '.join(sorted(missing))}: see its .gitignore")


def _files(path: Path) -> list[Path]:
    """The file, or all files of a folder."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def fetch_state(state: HubState, *, patience: Patience = _FETCH_PATIENCE) -> Path:
    """The local folder of a state on the hub: the files that its manifest lists, in the hub's own cache.

    Raises:
        UserError: It is not there, there is no access or no connection, or it is not complete.
    """
    found: list[Path] = []
    where = f"--resume {state.text}"

    def fetch(api: "HfApi") -> None:
        found.append(_fetch_state(api, state))

    try:
        _quiet_client(_CHECK_SECONDS)
        persistently(lambda: _guarded(state.repository, fetch), patience, threading.Event())
    except RefusedError as error:
        raise UserError(f"cannot fetch the state: {error}", where=where, remedy=f"Check the name. {LOGIN}") from None
    except UnreachedError as error:
        raise UserError(
            f"cannot fetch the state: the hub does not answer ({error})",
            where=where,
            remedy="Check the connection; what has arrived is not fetched again.",
        ) from None
    raise_if_any([replace(problem, where=where) for problem in check_state(found[-1])])
    return found[-1]


def _fetch_state(api: "HfApi", state: HubState) -> Path:
    """Fetch the files of one commit, so that all belong together whatever is uploaded meanwhile."""
    target = {"repo_id": state.repository.name, "repo_type": state.repository.type}
    commit = api.repo_info(**target, revision=state.revision, timeout=_CHECK_SECONDS).sha

    def fetched(name: str) -> Path:
        place = str(PurePosixPath(state.path, name))
        return Path(api.hf_hub_download(**target, filename=place, revision=commit))

    folder = fetched(MANIFEST).parent
    for name in files_of(folder):
        log.info("fetching %s of the state", name)
        fetched(name)
    return folder


def _guarded(repository: Repository, action: "Callable[[HfApi], None]") -> None:
    """Let ``action`` use the hub; what goes wrong comes out as one of two errors, without secrets.

    Raises:
        RefusedError: There is no use in trying again.
        UnreachedError: There may be.
    """
    from huggingface_hub import HfApi

    failure: RefusedError | UnreachedError
    try:
        return action(HfApi(token=repository.token))
    except (RefusedError, UnreachedError):
        raise
    except Exception as error:
        failure = _failure(error, _secrets(repository))
    # Outside the clause: the exception of the library, which may hold the token, is not kept as the context.
    raise failure


def _secrets(repository: Repository) -> list[str]:
    from huggingface_hub import get_token

    try:
        stored = None if repository.token else get_token()
    except Exception:  # it may ask a server for a new one, which is not reached either
        stored = None
    return [token for token in (repository.token, stored) if token]


def _quiet_client(seconds: float) -> None:
    """Requests end ``seconds`` after the last sign of life, and say nothing by themselves beside training's lines."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils._http import default_client_factory
    from huggingface_hub.utils.logging import set_verbosity_error

    def client() -> Any:
        made = default_client_factory()
        made.timeout = (_CHECK_SECONDS, seconds, seconds, seconds)
        return made

    set_client_factory(client)
    set_verbosity_error()
    disable_progress_bars()
    for name in ("httpx2", "httpcore2"):
        # They tell of each request, the latter with what is wrong with a header, and that may be the token.
        logging.getLogger(name).setLevel(logging.WARNING)


def _failure(error: Exception, secrets: list[str]) -> RefusedError | UnreachedError:
    """What an exception of the library, or one that caused it, means for the upload."""
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    chain = list(_causes(error))
    if any(isinstance(one, OfflineModeIsEnabled) for one in chain):
        return RefusedError("HF_HUB_OFFLINE is set")
    if any(isinstance(one, LocalTokenNotFoundError) for one in chain):
        return RefusedError("there is no access token")
    answer = next((one for one in (getattr(one, "response", None) for one in chain) if one is not None), None)
    if answer is not None:
        return _answered(answer, error, secrets)
    if any(isinstance(one, LocalEntryNotFoundError) for one in chain):
        return UnreachedError("no connection")
    reason = _cleaned(error, secrets)
    final = (HFValidationError, FileNotFoundError, PermissionError, IsADirectoryError)
    return RefusedError(reason) if any(isinstance(one, final) for one in chain) else UnreachedError(reason)


def _answered(answer: Any, error: Exception, secrets: list[str]) -> RefusedError | UnreachedError:
    status = int(answer.status_code)
    if status in _PASSING or status >= 500:
        retry_after = str(answer.headers.get("Retry-After", "")).strip()
        seconds = float(retry_after) if retry_after.isdigit() else 0.0
        return UnreachedError(f"the hub answers with status {status}", seconds)
    said = {401: "the access token is refused", 403: "the access token does not allow it", 404: "it is not there"}
    detail = _cleaned(error, secrets)
    return RefusedError(f"{said[status]}: {detail}" if status in said else detail)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _cleaned(error: Exception, secrets: list[str]) -> str:
    """The error in one line, without secrets and without the signatures of addresses."""
    text = " ".join(str(error).split()) or type(error).__name__
    for secret in secrets:
        text = text.replace(secret.strip(), "***")
    text = re.sub(r"(?i)(bearer\s+)[^\s'\"]+", r"\1***", text)
    return re.sub(r"\?\S+", "", text)[:300]
