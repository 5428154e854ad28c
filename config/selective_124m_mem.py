# Selective attention with the memory loss of 2410.02703, section 6.
from config.base_124m import *

out_dir = 'out/selective_124m_mem'
selective = True
memory_loss = 0.1
