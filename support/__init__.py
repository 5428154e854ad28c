"""What is not the method: settings, files, checkpoints, devices, downloads, pretrained weights.

Scripts import this package before torch, because OpenMP reads the following variables only once. By default its threads
spin while they wait for each other, and beside another busy process training gets 30 times slower. Without any spinning,
waking them took a quarter of the speed on a machine of two cores: some microseconds of it, then sleep.
"""
import os
import signal
import sys

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

# While a script of ours imports, Ctrl-C ends it at once and in silence, as settings.run has yet to catch it.
_script = getattr(sys.modules.get('__main__'), '__file__', None) or ''
if os.path.abspath(_script).startswith(os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep):
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
