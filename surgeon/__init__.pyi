from surgeon import recipe as recipe
from surgeon.api import diff as diff
from surgeon.api import doctor as doctor
from surgeon.api import edit as edit
from surgeon.api import evaluate as evaluate
from surgeon.api import export as export
from surgeon.api import inspect as inspect
from surgeon.api import measure as measure
from surgeon.api import merge as merge
from surgeon.api import prune as prune
from surgeon.api import quantize as quantize
from surgeon.api import report as report
from surgeon.api import verify as verify
from surgeon.cli.bars import bars as bars
from surgeon.deploy.push import push as push
from surgeon.errors import SurgeonError as SurgeonError
from surgeon.pipeline.run import run as run
from surgeon.python.catalogue import explain as explain
from surgeon.python.catalogue import methods as methods
from surgeon.python.cleaning import clean as clean
from surgeon.python.progress import Progress as Progress
from surgeon.python.results import Result as Result

__version__: str
__all__: list[str]
