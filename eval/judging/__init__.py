"""How good the attempts of a response are; the kinds of judges that come with the project register themselves here."""

from eval.judging import lexical, model_judge

__all__ = ["lexical", "model_judge"]
