from forescale.engine.messages import *  # noqa: F403  TEMPORARY: the lead moved the messages to engine/messages.py (engine may not import control); import from there
