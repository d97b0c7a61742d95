"""fit, validate, test and predict: LightningCLI with shared defaults, recipes by name, run folders and checks before anything loads."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.markup import escape
from rich.table import Table

from qlora_lightning.callbacks.adapter_checkpoint import FOLDER, AdapterCheckpoint, put_right
from qlora_lightning.callbacks.announce import Announce
from qlora_lightning.callbacks.history import History
from qlora_lightning.callbacks.mmlu import MMLU
from qlora_lightning.callbacks.mmlu import show as show_mmlu
from qlora_lightning.callbacks.monitor import Monitor
from qlora_lightning.callbacks.nonfinite import Nonfinite
from qlora_lightning.callbacks.out_of_memory import OutOfMemory
from qlora_lightning.callbacks.predictions import Predictions
from qlora_lightning.callbacks.progress import RunProgress
from qlora_lightning.callbacks.random_state import RandomState
from qlora_lightning.callbacks.resume import Resume
from qlora_lightning.callbacks.samples import Samples
from qlora_lightning.callbacks.stop import StopBetweenSteps
from qlora_lightning.callbacks.validation import ValidateEvery
from qlora_lightning.console import console, say
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.disk import write_whole
from qlora_lightning.errors import UserError
from qlora_lightning.loggers import RunCSVLogger, RunWandbLogger
from qlora_lightning.modeling.adapters import adapter_metadata
from qlora_lightning.modeling.sources import resolve_base
from qlora_lightning.module import QLoRAModule
from qlora_lightning.parser import OneLineParser
from qlora_lightning.recipes import find_datamodule, find_recipe, names_dataset, shared_defaults
from qlora_lightning.redaction import redacted
from qlora_lightning.run_folder import check_folder, clear_folder, find_checkpoint, lies_in, run_folder
from qlora_lightning.run_lock import RunLock
from qlora_lightning.strategies import QLoRAStrategy

CONFIG_FILE = "config.yaml"


def run(arguments: list[str]) -> None:
    """Run one of LightningCLI's commands with ``arguments`` (the command first)."""
    command, *options = resolve_names(arguments)
    QLoRACLI([command, "--config", str(shared_defaults()), *options])


def resolve_names(arguments: list[str]) -> list[str]:
    """Replace the names of shipped recipes (after ``--config``) and data modules (after ``--data.dataset``) by their files.

    A data set that is named takes the place of one named before. The parser would merge the two: rows of one, template and limits of the
    other; so everything about a data set is set back to its default first.
    """
    finders = {"--config": find_recipe, "-c": find_recipe, "--data.dataset": find_datamodule}
    blank = ["--data.dataset", json.dumps({field.name: field.default for field in fields(DatasetSpec)})]
    resolved, rest = [], list(arguments)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if option not in finders or not (equals or rest):
            resolved.append(f"{option}{equals}{value}")
            continue
        found = finders[option](value if equals else rest.pop(0))
        if isinstance(found, Path) and (option == "--data.dataset" or names_dataset(found)):
            resolved += blank
        # absolute: jsonargparse would take mine.yaml for a name in a module
        resolved += [option, str(found.absolute() if isinstance(found, Path) else found)]
    return resolved


class OneLineLightningParser(OneLineParser, LightningArgumentParser):
    """LightningCLI's parser with errors of one line."""


class RunFolder(SaveConfigCallback):
    """Clear the run folder of an earlier run where that was asked for, and write the configuration into it and to the loggers.

    Not before the fit starts, with its data read and its model loaded: what fails until then must not cost the earlier run.
    """

    continues = False
    """Whether the run goes on with what the folder holds; set before the Trainer runs."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        root = Path(trainer.default_root_dir)
        if not self.continues:
            clear_folder(root)
        config = self.config.clone()
        config.overwrite, config.ckpt_path = False, None  # of this start, not of the run
        write_whole(root / CONFIG_FILE, redacted(self.parser.dump(config, skip_none=False)))
        for logger in trainer.loggers:
            logger.log_hyperparams(config.as_dict())


class QLoRACLI(LightningCLI):
    """``lightning_cli.yaml`` gives the defaults of every run, a recipe what differs, the command line what differs today."""

    def __init__(self, arguments: list[str]) -> None:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a dataclass explains its fields under them
        self._command = arguments[0]
        self.initial_adapter: Path | None = None
        self._lock: RunLock | None = None
        try:
            self._run(arguments)
        finally:
            if self._lock is not None:
                self._lock.release()

    def _run(self, arguments: list[str]) -> None:
        self._resume = Resume()
        own = [History(), StopBetweenSteps(), self._resume, RandomState(), Monitor(), RunProgress(), Announce(), OutOfMemory()]
        super().__init__(
            QLoRAModule,
            InstructionDataModule,
            parser_class=OneLineLightningParser,
            save_config_callback=RunFolder,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults={"callbacks": own},
            args=arguments,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one command that was asked for: to build the options of all four costs seconds at every start."""
        return {self._command: LightningCLI.subcommands()[self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(AdapterCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ValidateEvery, "validation")
        parser.add_lightning_class_args(Nonfinite, "nonfinite")
        parser.add_lightning_class_args(Samples, "samples")
        parser.add_lightning_class_args(Predictions, "generation")
        parser.add_lightning_class_args(MMLU, "mmlu")
        parser.add_argument("--overwrite", type=bool, default=False, help="Delete the run that the run folder holds and begin anew (fit).")
        parser.add_argument(
            "--json", type=bool, default=False, help="Print results as one JSON document on standard output (validate, test)."
        )
        parser.link_arguments("model.base_model", "data.base_model")
        parser.link_arguments("model.revision", "data.base_revision")

    def _parse_ckpt_path(self) -> None:
        """Lightning reads hyperparameters from the checkpoint here; ours are in the recipe, and the file is checked where it is loaded."""

    # ---- before anything is loaded ----

    def before_instantiate_classes(self) -> None:
        """Settle the run folder, the checkpoint to start from and the loggers."""
        config = self.config[self.subcommand]
        self.root = run_folder(config)
        config.trainer.default_root_dir = str(self.root)
        if self.subcommand == "fit":
            self._lock = RunLock(self.root)
            put_right(self.root / FOLDER)
        if "verbose" in config:
            config.verbose = False  # Lightning's own table would go to standard output; `_report` takes its place
        given, fitting = config.ckpt_path, self.subcommand == "fit"
        config.ckpt_path, self.initial_adapter = find_checkpoint(given, self.root, required=not fitting)
        source = self.initial_adapter or (Path(config.ckpt_path) if config.ckpt_path else None)
        self._continues = str(given) == "last" or (config.ckpt_path is not None and lies_in(Path(config.ckpt_path), self.root / FOLDER))
        if fitting:
            check_folder(self.root, self._continues, config.overwrite, source)
        for logger in _as_list(config.trainer.logger):
            if isinstance(logger, Namespace) and "save_dir" in logger.init_args and logger.init_args.save_dir is None:
                logger.init_args.save_dir = str(self.root)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the CSV logger to whatever a fit logs to; the other commands report on the terminal."""
        chosen = [logger for logger in _as_list(self._get(self.config_init, "trainer")["logger"]) if not isinstance(logger, bool)]
        history = RunCSVLogger(str(self.root))
        loggers = [history, *chosen] if self.subcommand == "fit" else []
        for logger in chosen:
            if isinstance(logger, RunWandbLogger):
                logger.resume = self._continues
                logger.history = history if loggers else None
                if self.subcommand == "validate" and self._continues and logger.id_path.is_file():
                    self._mmlu.record = logger
        try:
            return super().instantiate_trainer(logger=loggers or False, **kwargs)
        except (ValueError, MisconfigurationException) as error:
            raise UserError(f"the trainer's settings do not work together: {error}") from error

    def after_instantiate_classes(self) -> None:
        """Check what needs no model: strategy, precision and batch arithmetic."""
        self.model.initial_adapter = self.initial_adapter
        if checkpoint := self._get(self.config, "ckpt_path"):
            self._resume.checkpoint = Path(checkpoint)
        if self.initial_adapter is not None:
            trained = adapter_metadata(self.initial_adapter).get("template", self.datamodule.spec.template)
            if trained != self.datamodule.spec.template:
                say(f"warning: {self.initial_adapter} was trained with template {trained}, this run uses {self.datamodule.spec.template}")
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunFolder):
                # a run that was killed before its first checkpoint left metrics only: there is nothing to go on with
                callback.continues = self._continues and self._get(self.config, "ckpt_path") is not None
        if not isinstance(self.trainer.strategy, QLoRAStrategy):
            raise UserError(
                f"trainer.strategy must be qlora, got {type(self.trainer.strategy).__name__}; leave it as lightning_cli.yaml has it"
            )
        self.trainer.strategy.policy.check()
        if str(self.trainer.precision) != "32-true":
            raise UserError(
                f"trainer.precision must stay unset, got {self.trainer.precision}; model.compute chooses the dtype of the products"
            )
        self.datamodule.check(self.trainer.accumulate_grad_batches, self.trainer.world_size)

    # Data is prepared by whoever comes first, before there is a process group whose other ranks could tire of waiting.

    def before_fit(self) -> None:
        resolve_base(self.model.base_model)  # weights that are not there are missed before rows are read, which may take long
        self.datamodule.setup("fit")

    def before_validate(self) -> None:
        self._mmlu.read()
        if self._mmlu.wanted:  # there is something to score on without held-out rows
            self.datamodule.heldout = "unused" if self.trainer.limit_val_batches == 0 else "optional"
        self.datamodule.setup("validate")

    def before_test(self) -> None:
        self.datamodule.setup("test")

    def before_predict(self) -> None:
        self.datamodule.setup("predict")

    # ---- after ----

    @property
    def _mmlu(self) -> MMLU:
        mmlu: MMLU = self._get(self.config_init, "mmlu")
        return mmlu

    def after_validate(self) -> None:
        if not self._mmlu.wanted:
            self._report()
            return
        name = self.initial_adapter.name if self.initial_adapter else Path(self._get(self.config, "ckpt_path") or "base").stem
        scores = self._mmlu.evaluate(self.trainer, self.model, name)
        self._report(scores.metrics())
        if not self._get(self.config, "json"):
            show_mmlu(scores)

    def after_test(self) -> None:
        self._report()

    def _report(self, more: Mapping[str, float] = MappingProxyType({})) -> None:
        """Print what was measured; ``more`` of it in the JSON document alone."""
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        if self._get(self.config, "json"):
            print(json.dumps({**metrics, **more}))
            return
        if not metrics:
            return
        table = Table(title=f"{self.subcommand} of {self.initial_adapter or self._get(self.config, 'ckpt_path') or self.model.base_model}")
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in metrics.items():
            table.add_row(escape(name), f"{value:.6g}")
        console.print(table)

    def predict(self, **kwargs: Any) -> None:
        """Answer the held-out prompts; ``Predictions`` writes them as they come, so that none need be kept."""
        self.trainer.predict(**{**kwargs, "return_predictions": False})


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
