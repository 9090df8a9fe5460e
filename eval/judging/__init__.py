"""How good the attempts of a response are; the kinds of judges that come with the project register themselves."""

import eval.judging.lexical
import eval.judging.likelihood
import eval.judging.model_judge  # noqa: F401
