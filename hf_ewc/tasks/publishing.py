"""The last model of a run on the Hugging Face Hub, with its state and model card."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from transformers import TrainingArguments

from hf_ewc.config import EWCConfig
from hf_ewc.metrics import AccuracyMatrix
from hf_ewc.report import score_table
from hf_ewc.state.card import with_section
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.state.hub import present_card
from hf_ewc.training.model_card import section_on


class Repository:
    """Where `push_to_hub` of the training arguments puts a run's last model; the main process does.

    It is named by `hub_model_id`, else after the output folder.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self.is_wanted = bool(args.push_to_hub)
        self._args = args
        self._api = HfApi(token=args.hub_token)
        self.name = args.hub_model_id or Path(str(args.output_dir)).resolve().name

    def make(self) -> None:
        """Make it if it is not there: before training, for who is not logged in to hear of it."""
        private = self._args.hub_private_repo
        self.name = self._api.create_repo(self.name, private=private, exist_ok=True).repo_id

    def upload(
        self,
        folder: Path,
        matrix: AccuracyMatrix,
        config: EWCConfig | None,
        state: EWCState | None,
    ) -> None:
        """Put up a saved model with all that lies beside it, and its card.

        What a card that is there already says is kept, but for the section on the state.
        """
        revision = self._args.hub_revision
        card = present_card(self._api, self.name, revision) or _new_card(folder, matrix)
        if state and config is not None:
            card = with_section(card, section_on(config, state))
        self._api.upload_folder(
            repo_id=self.name,
            folder_path=folder,
            revision=revision,
            commit_message=f"The model after {matrix.tasks[-1]}",
            ignore_patterns="README.md",
            delete_patterns="ewc_state-*.safetensors",
        )
        self._api.upload_file(
            path_or_fileobj=card.encode(),
            path_in_repo="README.md",
            repo_id=self.name,
            revision=revision,
            commit_message="The model card",
        )


def _new_card(folder: Path, matrix: AccuracyMatrix) -> str:
    library = "peft" if (folder / "adapter_config.json").is_file() else "transformers"
    return (
        f"---\nlibrary_name: {library}\n---\n\n"
        f"Trained on {len(matrix.tasks)} tasks, one after another, by `hf_ewc.run_tasks`.\n\n"
        f"{score_table([matrix])}\n"
    )
