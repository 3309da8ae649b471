from .evaluating import Evaluation as Evaluation, Scores as Scores, evaluate as evaluate, stderr_of as stderr_of
from .harness import HarnessLM as HarnessLM
from .scoring import Scorer as Scorer, score as score
