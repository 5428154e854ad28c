# With normalised queries and keys in every arm, as the models of 2410.02703 have them.
from config.claims_english import *

qk_norm = True
