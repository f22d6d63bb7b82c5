"""Base of all configuration models: unknown keys are errors that list the known ones, beside all other errors."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from vlit.errors import did_you_mean


class Strict(BaseModel):
    """Immutable pydantic model without extra keys; attribute docstrings become the configuration reference."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="wrap")
    @classmethod
    def _no_unknown_keys(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Every unknown key is reported, and what is wrong with the known ones too: one round mends a file."""
        unknown = [key for key in data if key not in cls.model_fields] if isinstance(data, dict) else []
        if not unknown:
            return handler(data)
        errors = [InitErrorDetails(type=_unknown_key(key, cls), loc=(), input=data[key]) for key in unknown]
        try:
            handler({key: value for key, value in data.items() if key in cls.model_fields})
        except ValidationError as error:
            meant = " ".join(_hint(key, cls) for key in unknown)  # a mistyped key is not missing as well
            errors += [
                _again(detail)
                for detail in error.errors()
                if not (detail["type"] == "missing" and f'Did you mean "{detail["loc"][0]}"?' in meant)
            ]
        raise ValidationError.from_exception_data(cls.__name__, errors)


def _unknown_key(key: object, cls: type[BaseModel]) -> PydanticCustomError:
    context = {"key": str(key), "hint": _hint(key, cls)}
    return PydanticCustomError("unknown_key", ".{key}: unknown key. {hint}", context)


def _hint(key: object, cls: type[BaseModel]) -> str:
    return did_you_mean(str(key), cls.model_fields)


def _again(detail: Any) -> InitErrorDetails:
    """One line of a ValidationError in the form that makes a new one."""
    kind = PydanticCustomError(detail["type"], "{text}", {**detail.get("ctx", {}), "text": detail["msg"]})
    return InitErrorDetails(type=kind, loc=detail["loc"], input=detail["input"])
