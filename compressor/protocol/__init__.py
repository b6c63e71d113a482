"""Defines what the author of a pass sees: three classes of passes, their views of the model, and what they return.

Nothing here imports torch at run time, so that the schema, the help and the list of passes load at once.
"""

from compressor.model.facts import BlockTokens as BlockTokens
from compressor.model.facts import Decision as Decision
from compressor.model.facts import ModelFacts as ModelFacts
from compressor.model.facts import PrunableModule as PrunableModule
from compressor.model.facts import Redefinition as Redefinition
from compressor.model.facts import TokenFacts as TokenFacts
from compressor.model.weights import FUNCTION_ROLES as FUNCTION_ROLES
from compressor.model.weights import Group as Group
from compressor.model.weights import Producer as Producer
from compressor.model.weights import Stage as Stage
from compressor.model.weights import Weight as Weight
from compressor.protocol.passes import Fact as Fact
from compressor.protocol.passes import Pass as Pass
from compressor.protocol.passes import RewritePass as RewritePass
from compressor.protocol.passes import TokenPass as TokenPass
from compressor.protocol.passes import Traits as Traits
from compressor.protocol.passes import WeightPass as WeightPass
from compressor.protocol.views import BlockView as BlockView
from compressor.protocol.views import Folds as Folds
from compressor.protocol.views import PartView as PartView
from compressor.protocol.views import RunnableModel as RunnableModel
from compressor.protocol.views import State as State
from compressor.protocol.views import WholeModel as WholeModel
from compressor.protocol.work import DataSize as DataSize
from compressor.protocol.work import PartWork as PartWork
from compressor.protocol.work import Work as Work
