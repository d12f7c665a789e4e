"""The tests, and the processes that they start."""

from appliance.core.exits import leave_memory_to_the_system

leave_memory_to_the_system()
