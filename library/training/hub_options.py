"""Options of the Hugging Face hub. Imports nothing heavy."""

import re
from dataclasses import dataclass, fields, replace

from library.errors import Problem
from library.options import option


@dataclass(frozen=True, kw_only=True, slots=True)
class HubOptions:
    """Hugging Face hub."""

    huggingface_repo_id: str | None = option(
        None,
        metavar="OWNER/NAME",
        help="Repository that every saved model is uploaded to; it is created if it is not there.",
    )
    huggingface_repo_type: str | None = option(
        None, metavar="TYPE", help="Type of the repository: model (when absent), dataset or space."
    )
    huggingface_path_in_repo: str | None = option(
        None, metavar="FOLDER", help="Folder in the repository; its root when absent."
    )
    huggingface_token: str | None = option(
        None,
        metavar="TOKEN",
        help="Access token of the hub; that of HF_TOKEN, or of a log-in by 'hf auth login', when absent. Never stored.",
    )
    huggingface_repo_visibility: str | None = option(
        None, metavar="VISIBILITY", help="'public' makes a new repository public; otherwise it is private."
    )
    save_state_to_huggingface: bool = option(False, help="Upload states as well.")
    resume_from_huggingface: bool = option(
        False, help="--resume names a state on the hub: owner/name/path[:revision[:type]]."
    )
    async_upload: bool = option(
        False, help="Upload while training goes on; otherwise training waits up to 5 minutes for each upload."
    )

    def problems(self) -> list[Problem]:
        """Names that the hub does not know, and a token that is none."""
        found = []
        name, folder, token = self.huggingface_repo_id, self.huggingface_path_in_repo, self.huggingface_token
        if name and not _is_repository_id(name):
            remedy = "Write it as owner/name, with letters, digits, '-', '_' and '.', at most 96 of them each."
            found.append(Problem(f"{name} is no repository of the hub", "--huggingface_repo_id", remedy))
        if self.huggingface_repo_type not in (None, "", "model", "dataset", "space"):
            what = f"{self.huggingface_repo_type} is no type of a repository"
            found.append(Problem(what, "--huggingface_repo_type", "Use model, dataset or space."))
        if folder and (".." in folder.split("/") or "\\" in folder):
            remedy = "Write it as folder or folder/folder."
            found.append(Problem(f"{folder} is no folder in a repository", "--huggingface_path_in_repo", remedy))
        if token and not re.fullmatch(r"[!-~]+", token.strip()):
            remedy = "Copy it once more from the hub's page."
            found.append(Problem("this is no access token", "--huggingface_token", remedy))
        return found

    def notices(self) -> list[str]:
        """Settings of uploads that are not made, and a visibility that is neither public nor private."""
        visibility = self.huggingface_repo_visibility
        if self.huggingface_repo_id:
            if visibility in (None, "", "public", "private"):
                return []
            return [f"--huggingface_repo_visibility {visibility} means private"]
        used = {"resume_from_huggingface", *(["huggingface_token"] if self.resume_from_huggingface else [])}
        given = [f"--{one.name}" for one in fields(self) if getattr(self, one.name) and one.name not in used]
        return [f"without effect without --huggingface_repo_id: {', '.join(given)}"] if given else []

    def settled(self) -> "HubOptions":
        """The same, with empty texts taken as absent, and without slashes around the folder."""
        token, folder = self.huggingface_token, self.huggingface_path_in_repo
        return replace(
            self,
            huggingface_repo_id=self.huggingface_repo_id or None,
            huggingface_repo_type=self.huggingface_repo_type or None,
            huggingface_token=(token.strip() if token else None) or None,
            huggingface_path_in_repo=(folder.strip("/") if folder else None) or None,
        )


def _is_repository_id(name: str) -> bool:
    """Whether the hub takes ``name`` for an id of owner and name."""
    part = r"\w(?:[\w.-]*\w)?"
    fits = re.fullmatch(f"{part}/{part}", name, re.ASCII) is not None and max(map(len, name.split("/"))) <= 96
    return fits and "--" not in name and ".." not in name and not name.endswith(".git")
